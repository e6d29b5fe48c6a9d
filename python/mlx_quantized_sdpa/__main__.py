"""``python -m mlx_quantized_sdpa COMMAND``."""

import argparse
import contextlib
import importlib
import sys

USAGE = """usage: python -m mlx_quantized_sdpa COMMAND [--kv SPEC] ...
       python -m mlx_quantized_sdpa eval [MODEL] [--kv q8,k8v4,...]

generate, chat, server, cache_prompt
       mlx-lm's commands, with all their options, over quantized KV caches;
       SPEC is q8 (the default), k8v4, turbo4, rot4+recent64 and the like
eval   what quantized KV caches change, and save, against the dense one

COMMAND --help names the options."""

OWN_OPTIONS = """--kv SPEC: what the KV cache stores, such as q8, k8v4 or turbo4.
--pool-tokens N: one pool of blocks for N tokens of all requests; prompts share the
  blocks of beginnings that they have in common, and wait where there are too few.
--pool-folder DIR: blocks that give way are saved there, and found again.
--pool-folder-bytes N: of that folder; the files not used for longest go first."""

LM_COMMANDS = ("generate", "chat", "server", "cache_prompt")


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
    if command == "server":
        parser.add_argument("--pool-tokens", type=int)
        parser.add_argument("--pool-folder")
        parser.add_argument("--pool-folder-bytes", type=int)
    options, others = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(others):
        print(OWN_OPTIONS if command == "server" else OWN_OPTIONS.splitlines()[0])
        print()
    if switches := list(filter(is_lm_switch, others)):
        print(
            f"[{command}] what the caches store must be said by --kv SPEC, such as "
            f"--kv q4g64; got {', '.join(switches)}.",
            file=sys.stderr,
        )
        return 2
    before = sys.argv
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(enabled(kv=options.kv))
            if command == "server":
                stack.enter_context(serving(options))
        except (ImportError, ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 2
        stack.callback(setattr, sys, "argv", before)
        sys.argv = [f"python -m mlx_quantized_sdpa {command}", *others]
        importlib.import_module(f"mlx_lm.{command}").main()
    return 0


def is_lm_switch(argument: str) -> bool:
    """Whether it is for mlx-lm's own quantized caches, perhaps shortened."""
    name = argument.partition("=")[0]
    if name.startswith("--kv-"):
        return True
    return len(name) > 2 and "--quantized-kv-start".startswith(name)


def serving(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """The server's caches: each by itself, or all in a pool of blocks."""
    from .paged import PagedPool
    from .serving import growing_server, paged_server

    if options.pool_tokens is None:
        if options.pool_folder is not None:
            raise ValueError(
                "[server] --pool-folder needs --pool-tokens, whose blocks are saved "
                f"there; got --pool-folder {options.pool_folder} alone."
            )
        return growing_server()

    most = options.pool_folder_bytes
    if most is not None and (options.pool_folder is None or most < 0):
        raise ValueError(
            "[server] --pool-folder-bytes must be at least 0 and with --pool-folder; "
            f"got {most} with {options.pool_folder}."
        )

    def make_pool() -> PagedPool:
        return PagedPool(options.kv, options.pool_tokens)

    # What is wrong with the numbers shows before any model is loaded.
    make_pool()
    return paged_server(make_pool, options.pool_folder, most)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
