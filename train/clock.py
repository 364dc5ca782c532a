"""Where the time of a run goes."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by name. Work that a GPU does later counts for whoever waits for it: a step waits for its own."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def since(self, earlier: Counter[str]) -> dict[str, float]:
        """Shares of the time since `earlier`, a copy of `seconds`; they sum to 1."""
        spent = {name: self.seconds[name] - earlier[name] for name in self.seconds}
        total = sum(spent.values())
        return {name: each / total for name, each in spent.items()} if total > 0 else {}

    def __str__(self) -> str:
        """step 96.1 %, validation 2.0 %, ..., largest first."""
        shares = sorted(self.since(Counter()).items(), key=lambda each: -each[1])
        return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)
