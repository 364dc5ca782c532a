"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a scratch path beside `path`; it becomes `path` when the block ends well and vanishes when it raises.

    Missing folders are made. The scratch file lies in the same folder, as a rename is atomic on one file system only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(0o644)  # mkstemp's files are readable by their owner alone
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
