"""SIGTERM and SIGINT end a run between two steps, not in one."""

import os
import signal
import sys
import time
from types import FrameType

REPEATED = 2.0  # seconds: torchrun and the terminal may both pass on one Ctrl-C


class StopSignals:
    """While it is entered, notes the first SIGTERM or SIGINT in `received`; a second Ctrl-C later on ends at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self.at = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {kind: signal.signal(kind, self.note) for kind in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.at = signal.Signals(number), time.monotonic()
            said = f"\n{self.received.name}: finishing this step, then saving\n"
            os.write(sys.stderr.fileno(), said.encode())  # print may be in the middle of something
        elif number == signal.SIGINT and time.monotonic() - self.at > REPEATED:
            raise KeyboardInterrupt
