"""How much a model loses, and what it saves, with a quantized KV cache.

``python -m mlx_quantized_sdpa eval MODEL --kv q8,k8v4`` runs it; :mod:`.measure` has
the parts for use in Python. Needs mlx-lm.
"""
