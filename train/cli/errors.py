"""How a script ends with an error that its user can fix: one line on stderr, and exit code 2."""

import contextlib
import re
import sys
from collections.abc import Iterator

from train.open_files import describe_open_files_limit, is_out_of_files
from train.progress import close_bars

OUT_OF_MEMORY = re.compile(
    "out of memory|allocate memory|not enough memory|ALLOC_FAILED|(calculat|multiplicat)ion over"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def describe_error(error: Exception) -> str | None:
    """Returns the message, on one line, of an error that a user can fix; None for other errors of torch."""
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_files(error):
        return describe_open_files_limit(error)
    if is_out_of_memory(error):
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"out of memory ({reason}): pass a smaller --batch_size, a smaller network or smaller images"
    if isinstance(error, RuntimeError):
        remedies = "--num_workers 0, more memory (in Docker: --shm-size 8g), in training a longer --timeout_minutes"
        return f"{text} Remedies: {remedies}" if text.startswith("DataLoader ") else None  # a loading process failed
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return text


@contextlib.contextmanager
def one_line_errors(script: str) -> Iterator[None]:
    """Prints errors that a user can fix as one line, and exits with code 2."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        close_bars()
        message = describe_error(error)
        if message is None:
            raise
        print(f"{script}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        close_bars()
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
