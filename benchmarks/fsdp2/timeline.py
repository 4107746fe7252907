"""When a GPU computed and when it communicated in a step: how much of the gathers was hidden."""

from collections.abc import Iterable

Events = list[tuple[str, float, float]]  # lane, start and duration in us, as `training.Run.profile` gives them


def hidden(events: Events, lane: str = "all-gather") -> float | None:
    """The share of a lane's time in which the GPU also computed; FSDP2's own copies hide nothing.

    Args:
        events: Of one step.
        lane: "all-gather" or "reduce-scatter".

    Returns:
        From 0 to 1; None if the lane has no events.
    """
    spans = [(start, start + length) for one, start, length in events if one == lane]
    work = _union((start, start + length) for one, start, length in events if one == "compute")
    total = sum(end - start for start, end in spans)
    if not total:
        return None
    both = sum(max(0.0, min(end, until) - max(start, since)) for start, end in spans for since, until in work)
    return both / total


def predicted(layers: int, gather: float, products: float) -> float:
    """The share of its gathers, one before a layer's forward and one before its backward, that layers can hide.

    The first gather of a forward has no layer before it to hide behind, and neither has the first of a backward.

    Args:
        layers: Of the model.
        gather: Time of a gather.
        products: Time of a layer's forward. A backward with recomputation takes twice as long.
    """
    forward, backward = min(gather, products), min(gather, 2 * products)
    return (layers - 1) * (forward + backward) / (2 * layers * gather)


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans, those that overlap joined."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
