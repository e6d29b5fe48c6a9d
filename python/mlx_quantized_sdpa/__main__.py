"""``python -m mlx_quantized_sdpa COMMAND``."""

import sys

USAGE = """usage: python -m mlx_quantized_sdpa eval [MODEL] [--kv q8,k8v4,...]

eval   what quantized KV caches change, and save, against the dense one

COMMAND --help names the options."""


def main(arguments: list[str]) -> int:
    """Runs the command that the arguments begin with."""
    if arguments[:1] == ["eval"]:
        from .evaluation import cli

        return cli.main(arguments[1:])
    print(USAGE)
    return 0 if arguments[:1] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
