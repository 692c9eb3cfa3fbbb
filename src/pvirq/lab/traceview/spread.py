"""How a quantity is spread: percentiles of any number of values in little memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

KEPT_BITS: Final = 11
"""Values keep so many leading bits: those below 2048 are exact, larger ones are off by less than 0.05 %."""


@dataclass(slots=True)
class Spread:
    """Values that are whole numbers from 0 up. Their count, total, minimum and maximum are exact."""

    count: int = 0
    total: int = 0
    min: int = 0
    max: int = 0
    _buckets: dict[int, int] = field(default_factory=dict)  # lowest value in it -> how many

    def add(self, value: int) -> None:
        """One value more."""
        if not self.count or value < self.min:
            self.min = value
        self.max = max(self.max, value)
        self.count += 1
        self.total += value
        dropped = max(value.bit_length() - KEPT_BITS, 0)
        bucket = value >> dropped << dropped
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def percentile(self, percent: float) -> int:
        """The smallest value that at least `percent` of all don't exceed (nearest rank); 0 of no values."""
        rank = -(-self.count * percent // 100)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                half = (1 << max(bucket.bit_length() - KEPT_BITS, 0)) // 2
                return min(max(bucket + half, self.min), self.max)
        return self.max

    def as_dict(self) -> dict[str, int | float]:
        """For JSON."""
        return {
            "count": self.count,
            "min": self.min,
            "mean": round(self.total / self.count, 1) if self.count else 0,
            "p50": self.percentile(50),
            "p90": self.percentile(90),
            "p99": self.percentile(99),
            "max": self.max,
        }
