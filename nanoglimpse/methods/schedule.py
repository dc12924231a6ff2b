"""Where methods prune, and how a mean budget is shared between their stages."""

from collections.abc import Callable, Sequence

from nanoglimpse.errors import UsageError


def two_thirds(depth: int) -> int:
    """K = ⌈2L/3⌉, the layers that GlimpsePrune runs before it prunes (paper Sec. 4)."""
    return -(-2 * depth // 3)


def scaled(layers: Sequence[int], of: int, depth: int) -> list[int]:
    """Layers named for a decoder of `of` layers in one of `depth`, in order and distinct."""
    stops = [0]
    for layer in layers:
        stops.append(max(round(depth * layer / of), stops[-1] + 1))
    return stops[1:]


def solve(rising: Callable[[float], float], target: float) -> float:
    """Where a function that rises on [0, 1] reaches a target, from above; 1 if it does not."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


def unreachable(name: str, untouched: int, depth: int, ratio: float) -> UsageError:
    """The error for a mean budget below what the layers before the first stage hold."""
    return UsageError(
        f"method {name} leaves the cache of {untouched} of {depth} layers alone, so that "
        f"{ratio:g} cannot be reached; give a larger max_ratio, or kv_drop all"
    )
