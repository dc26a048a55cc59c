"""Choice of the largest input size whose time to first token meets a latency target.

Time grows almost in proportion to pixels, so two small sizes are measured on this
machine and extrapolated linearly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import InputError
from ..models.protocol import VisionModel
from ..pipeline import ask, run
from ..pipeline.timing import Clock
from ..processing.processor import Processor
from ..pruners import Plan


@dataclass(frozen=True)
class Fit:
    """An input size and its predicted time to first token."""

    image_size: int
    predicted_ms: float


def fit_image_size(
    model: VisionModel,
    processor: Processor,
    images: Sequence[Image.Image],
    text: str,
    plan: Plan,
    positions: str,
    milliseconds: float,
) -> Fit:
    """Return the largest input size, up to the model's own, that meets the target.

    milliseconds: latency target. Runs the model twice on each of two sizes; the first
    run warms up. The time is that of fenced stages, which is a little more than TTFT
    without fences. Raises `InputError` when even the smallest size is too slow.
    """
    largest = model.image_size
    least = max((pruner.keep_tokens or 0 for pruner in plan), default=0)
    probes = sorted({min(256, largest), min(512, largest)})
    times = []
    for size in probes:
        small = processor.at(size)
        enough = not least or _tokens(small, images) >= least
        probed = plan if enough else ()
        times.append(_measure(model, small, images, text, probed, positions))
    slope, start = 0.0, times[0]
    if len(probes) > 1:
        areas = [size * size for size in probes]
        slope = max(0.0, (times[1] - times[0]) / (areas[1] - areas[0]))
        start = times[0] - slope * areas[0]
        if start < 0:  # else small sizes would be predicted to take no time
            start, slope = 0.0, times[1] / areas[1]
    sizes = range(processor.stride, largest + 1, processor.stride)
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
    """Return the visual tokens of an image at this input size."""
    height, width = processor.pixels(images).shape[1:3]
    return (height // processor.stride) * (width // processor.stride)


def _measure(
    model: VisionModel,
    processor: Processor,
    images: Sequence[Image.Image],
    text: str,
    plan: Plan,
    positions: str,
) -> float:
    """Return the milliseconds of the second of two runs."""
    clock = Clock()
    for _ in range(2):
        clock = Clock()
        with clock.stage("preprocess") as done:
            scene = ask(processor, images, text)
            done.append(scene.pixels)
        cache = model.decoder.make_cache()
        options = {"positions": positions, "cache": cache, "clock": clock}
        read, _ = run(model, scene, plan, **options)
        with clock.stage("prefill") as done:
            done.append(model.decoder.logits(read.hidden))
    return sum(clock.times.values())
