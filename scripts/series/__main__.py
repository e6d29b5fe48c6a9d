import sys
from pathlib import Path

from . import report, tree
from .git import GitFailure, SeriesError
from .project import Project

COMMANDS = {
    "apply": tree.apply,
    "refresh": tree.refresh,
    "check": report.check,
    "check-files": report.check_files,
    "export": report.export,
    "drift": report.drift,
}


def main(arguments: list[str], root: Path) -> int:
    if len(arguments) != 1 or arguments[0] not in COMMANDS:
        print(f"usage: python -m series {'|'.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return 0 if COMMANDS[arguments[0]](Project(root)) is not False else 1
    except SeriesError as error:
        print(f"error: {error}", file=sys.stderr)
    except GitFailure as error:
        print(f"error: git failed: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parents[2]))
