"""``python -m mlx_quantized_sdpa COMMAND``."""

import argparse
import importlib
import sys

USAGE = """usage: python -m mlx_quantized_sdpa generate|chat|server [--kv SPEC] ...
       python -m mlx_quantized_sdpa eval [MODEL] [--kv q8,k8v4,...]

generate, chat, server
       mlx-lm's commands, with all their options, over quantized KV caches;
       SPEC is q8 (the default), k8v4, turbo4, rot4+recent64 and the like
eval   what quantized KV caches change, and save, against the dense one

COMMAND --help names the options."""

LM_COMMANDS = ("generate", "chat", "server")


def main(arguments: list[str]) -> int:
    """Runs the command that the arguments begin with."""
    if arguments[:1] == ["eval"]:
        from .evaluation import cli

        return cli.main(arguments[1:])
    if arguments and arguments[0] in LM_COMMANDS:
        return run_lm(arguments[0], arguments[1:])
    print(USAGE)
    return 0 if arguments[:1] in (["-h"], ["--help"]) else 2


def run_lm(command: str, arguments: list[str]) -> int:
    """One of mlx-lm's commands, with every model's caches quantized."""
    from .hook import enabled

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kv", default="q8")
    options, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print("--kv SPEC: what the KV cache stores, such as q8, k8v4 or turbo4.\n")
    try:
        running = enabled(kv=options.kv)
        running.__enter__()
    except (ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    before = sys.argv
    sys.argv = [f"python -m mlx_quantized_sdpa {command}", *others]
    try:
        importlib.import_module(f"mlx_lm.{command}").main()
    finally:
        sys.argv = before
        running.__exit__(None, None, None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
