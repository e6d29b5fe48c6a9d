"""Files of records, which a run that is interrupted leaves as they were."""

import contextlib
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
