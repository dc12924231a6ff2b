"""What may be said of the figures of some rounds: how far they spread, and when a ratio holds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nanoglimpse.benchmark.output import Output

# A ratio means nothing if its quartiles are further apart than this share of its median.
WIDE = 1 / 3


def spread(values: Sequence[float]) -> float | None:
    """±: half the distance between the quartiles of the rounds; None for a single round."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, method="inclusive")
    return (high - low) / 2


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one contender is as another, over rounds that both ran side by side.

    Attributes:
        low, median, high: quartiles of the quotients of each round.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> "Ratio":
        """From the times of both in each round."""
        quotients = [a / b for a, b in zip(slow, fast, strict=True)]
        if len(quotients) == 1:
            return cls(*quotients * 3)
        return cls(*statistics.quantiles(quotients, method="inclusive"))

    @property
    def means_nothing(self) -> bool:
        """Whether the rounds differ so much that no ratio should be told."""
        return self.high - self.low > WIDE * abs(self.median)


class Ratios:
    """Ratios as tables show them, and a line about those that are left out."""

    def __init__(self) -> None:
        self.left_out: list[str] = []

    def tell(self, what: str, slow: Sequence[float], fast: Sequence[float]) -> float | None:
        """The median ratio; None if it means nothing, which `write` then says of `what`."""
        ratio = Ratio.of(slow, fast)
        if not ratio.means_nothing:
            return ratio.median
        self.left_out.append(f"{what} ({ratio.low:.2f} to {ratio.high:.2f})")
        return None

    def write(self, out: Output) -> None:
        """Writes a line about the ratios that were left out, if there are any."""
        if self.left_out:
            rule = f"quartiles are further apart than {WIDE:.0%} of its median"
            out.note(f"no ratio where the {rule}: {'; '.join(self.left_out)}")
