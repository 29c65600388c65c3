"""Files that are whole or absent: nothing on disk is overwritten before its replacement is complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidar.errors import make_directory


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to beside a file, and puts what was written in the file's place.

    Args:
        path: The file to replace; its directory is made if there is none.

    Yields:
        A path in the same directory with the same suffix; if writing it fails, the old file stays as it was.

    Raises:
        DataError: Its directory cannot be made.
    """
    path = Path(path)
    make_directory(path.parent)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
