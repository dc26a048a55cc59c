"""The largest input size whose time to first token fits a budget.

Time grows almost in proportion to pixels, so two small sizes are measured on this
machine and a line is drawn through them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .errors import InputError
from .loading import Processor
from .models.fastvithd import TOTAL_STRIDE
from .pipeline import measure_stages
from .pruners import Pruner


@dataclass(frozen=True)
class Fit:
    """An input size and the time to first token that it is expected to take."""

    image_size: int
    predicted_ms: float


def fit_image_size(
    model,
    processor: Processor,
    images: Sequence[Image.Image],
    text: str,
    pruner: Pruner,
    positions: str,
    milliseconds: float,
) -> Fit:
    """The largest input size, up to the model's own, that is expected to fit.

    Runs the model twice on each of two sizes; the first run warms up. The time is that
    of fenced stages, which is a little more than TTFT without fences. Raises
    `InputError` when even the smallest size does not fit.
    """
    largest, least = model.image_size, pruner.keep_tokens or 0
    probes = sorted({min(256, largest), min(512, largest)})
    times = []
    for size in probes:
        small = processor.at(size)
        enough = not least or _tokens(small, images) >= least
        asked = (images, text, pruner if enough else Pruner("none"), positions)
        times.append(_measure(model, small, *asked))
    slope, start = 0.0, times[0]
    if len(probes) > 1:
        areas = [size * size for size in probes]
        slope = max(0.0, (times[1] - times[0]) / (areas[1] - areas[0]))
        start = times[0] - slope * areas[0]
    sizes = range(TOTAL_STRIDE, largest + 1, TOTAL_STRIDE)
    if least:
        sizes = [s for s in sizes if _tokens(processor.at(s), images) >= least]
    if not sizes:
        raise InputError(
            f"cannot keep {least} visual tokens; at {largest} px there are "
            f"{_tokens(processor.at(largest), images)}"
        )
    fits = [Fit(size, start + slope * size * size) for size in sizes]
    fitting = [fit for fit in fits if fit.predicted_ms <= milliseconds]
    if not fitting:
        raise InputError(
            f"no input size is expected to reach the first token in {milliseconds:g} "
            f"ms; the smallest, {fits[0].image_size} px, takes about "
            f"{fits[0].predicted_ms:.0f} ms"
        )
    return fitting[-1]


def _tokens(processor: Processor, images: Sequence[Image.Image]) -> int:
    """Visual tokens of a picture at this input size."""
    height, width = processor.pixels(images).shape[1:3]
    return (height // TOTAL_STRIDE) * (width // TOTAL_STRIDE)


def _measure(model, processor: Processor, images, text, pruner, positions) -> float:
    for _ in range(2):
        stages = measure_stages(model, processor, images, text, pruner, positions)
    return sum(dataclasses.asdict(stages).values())
