"""Keeps patches/ and overlay/ in step with an MLX tree: python -m series COMMAND."""
