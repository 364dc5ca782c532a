"""How many files a process may have open: the limit is raised when a command starts, and named where it is reached."""

import errno
import re
import resource
from contextlib import suppress

# What torch says instead of the system's error: for shared memory, and for batches sent by loading processes.
MESSAGES = re.compile("too many open files|received 0 items of ancdata", re.IGNORECASE)


def raise_open_files_limit() -> None:
    """Raises the soft limit of open files of this process, which processes that it starts inherit, to the hard one.

    The usual soft limit of 1,024 is too low for several loading processes. Where the system refuses, as macOS may for a
    hard limit without end, the limit stays.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_out_of_files(error: Exception) -> bool:
    """Returns whether an error says that this process has too many files open."""
    if isinstance(error, OSError):
        return error.errno == errno.EMFILE
    return isinstance(error, RuntimeError) and MESSAGES.search(str(error)) is not None


def describe_open_files_limit(error: Exception) -> str:
    """Returns the message of an error of too many open files, with the remedy, on one line."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    reason = " ".join(str(error).split())
    return f"more than {limit} open files ({reason}): type `ulimit -n 65536` first, or pass a smaller --num_workers"
