"""Processes that load data beside a training process, and signals."""

import os
import signal
import threading


def apart(worker: int) -> None:
    """Takes a loading process out of the reach of signals to the whole group, such as Ctrl-C.

    The training process saves before it ends on a signal, and needs its batch until then; a worker leaves when that
    process ends it, or is gone. A job manager sends SIGTERM to each process: only the one that the training process
    sends counts. The handlers of that process, inherited, would keep the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()
    else:  # macOS does not tell who sends a signal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent() -> None:
    """Ends this process when its parent sends it SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
