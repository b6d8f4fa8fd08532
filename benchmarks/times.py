"""Times of contenders that take turns."""

from __future__ import annotations

import statistics


class Times(dict[str, list[float]]):
    """Microseconds of a call by contender, turn by turn."""

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.items()}

    def ratio(self, a: str, b: str) -> float:
        """How many times b's time a takes: the median of single turns, so that what slows a turn weighs on both."""
        return statistics.median(x / y for x, y in zip(self[a], self[b], strict=True))
