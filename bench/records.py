"""Files of records, which a run that is interrupted leaves as they were."""

import contextlib
import json
import os


@contextlib.contextmanager
def written_whole(path):
    """A file to write records to; it takes its place once all are there.

    What was written by then stays beside it, in a file that ends in ``.partial``.
    """
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        yield file
    os.replace(partial, path)


def add_line(path, record):
    """One more line of JSON, on the disk when this returns."""
    with open(path, "ab+") as file:
        # What was cut off before ends here.
        file.seek(-1 if file.tell() else 0, os.SEEK_END)
        whole = file.read(1) in (b"\n", b"")
        file.write((b"" if whole else b"\n") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path):
    """The records of a file; a line that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
