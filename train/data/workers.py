"""Loading processes: they end with the training process, and no error of theirs leaves it waiting."""

import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Protocol

from torch import Tensor
from torch.utils.data import DataLoader

from train.config import TrainingConfig
from train.open_files import describe_open_files_limit, is_out_of_files

PARENT_CHECK_SECONDS = 1.0  # between looks of a loading process whether its parent still runs
MEMORY_REMEDY = "pass --num_workers 0, or give more (in Docker: --shm-size 8g)"


class Indexed(Protocol):
    """What DataLoader reads from."""

    def __getitem__(self, key: Any) -> Any: ...


def init_worker(worker: int) -> None:
    """The `worker_init_fn` of a DataLoader: shields a worker from signals meant for the training process.

    On a signal the training process saves a checkpoint before it exits, and needs its batches until then. So a worker
    leaves the process group, ignores Ctrl-C, and exits on SIGTERM only if its parent sent it: job schedulers send
    SIGTERM to every process. The parent's signal handlers, which a fork inherits, would keep the worker alive.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(exit_on_unsent)  # in this process only
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    else:  # macOS does not report the sender of a signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_on_unsent(error: Exception, batch: Any) -> NoReturn:
    """Ends a worker whose batch cannot be sent: the training process would wait for it until its timeout."""
    print(f"a loading process cannot send a batch: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def exit_with_parent(parent: int) -> None:
    """Exits on SIGTERM from the parent process, or when that has ended: a worker that waits would not notice."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


class WorkerSource:
    """A source for loading processes: the tensors of a batch are in shared memory, and an error that a user can fix is
    returned, to be raised in the training process as it is."""

    def __init__(self, source: Indexed):
        self.source = source

    def __getitem__(self, key: Any) -> Any:
        try:
            batch = self.source[key]
        except (ValueError, OSError) as error:
            # Others may not survive being sent: pickle calls their class with the message as its only argument.
            return error if type(error).__module__ == "builtins" else ValueError(str(error))
        try:  # torch would do this in a thread, whose errors leave the training process waiting
            for value in batch.values() if isinstance(batch, dict) else ():
                if isinstance(value, Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            if is_out_of_files(error):
                return ValueError(describe_open_files_limit(error))
            return ValueError(f"loading processes have too little shared memory ({error}): {MEMORY_REMEDY}")
        return batch


def load_batches(
    source: Indexed,
    keys: Iterable[Any],
    workers: int,
    timeout_minutes: float = TrainingConfig.timeout_minutes,
    **options,
) -> Iterator[Any]:
    """Yields source[key] for each key, loaded by `workers` processes (0: in this one); `options` are those of
    DataLoader.

    RuntimeError if a process ends, or a batch takes longer than `timeout_minutes`.
    """
    loader = DataLoader(
        WorkerSource(source) if workers else source,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        worker_init_fn=init_worker,
        timeout=60 * timeout_minutes if workers else 0,
        **options,
    )
    for batch in loader:
        if isinstance(batch, ValueError | OSError):
            raise batch
        yield batch
