"""Run the whole path on the embedded models and draw the kept tokens."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..act import predict_action
from ..checkpoints.embedded import PICTURES, POLICY_FRAME, Picture
from ..checkpoints.loading import load
from ..cli import Parser, command
from ..convert import convert
from ..files import check_pictures, write_picture
from ..generate import stream_generate
from ..models.protocol import VisionModel
from ..pipeline import VisualTokens
from ..processing.image import load_image
from ..processing.overlay import draw_overlay
from ..processing.processor import Processor
from ..pruners import DEFAULT_METHOD, POLICY_METHOD, Pruner
from ..runtime import device_name

KEEP_RATIOS = (1.0, 0.5)
Result = tuple[float, str, VisualTokens]  # TTFT in ms, answer
RUNS = 3  # warm runs; the median is printed
_NEXT = """
next:
  mlx_tokprune generate --image YOUR.jpg --prompt "..." --keep-ratio 0.5
  mlx_tokprune convert --hf-path apple/FastVLM-0.5B --mlx-path FastVLM-0.5B-mlx
  mlx_tokprune methods"""


def build_parser() -> Parser:
    """Return the parser of `mlx_tokprune demo`."""
    parser = Parser(
        prog="mlx_tokprune demo",
        description=__doc__,
        example="mlx_tokprune demo --method attention",
    )
    add = parser.add_argument
    help_ = "folder for the overlays (default: demo-output)"
    add("--output", metavar="FOLDER", default="demo-output", help=help_)
    help_ = f"pruning method of the questions (default: {DEFAULT_METHOD})"
    add("--method", default=DEFAULT_METHOD, help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    """Run both embedded models at each keep ratio, and write the overlays."""
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    pruners = [Pruner(args.method, ratio) for ratio in KEEP_RATIOS]
    files = [f"overlay_{number}.png" for number in range(len(PICTURES))]
    check_pictures(output, [*files, "overlay_policy.png"])
    print(f"converting the embedded checkpoints, on {device_name()}")
    model, processor = _convert("demo")
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"TTFT: time to first token, median of {RUNS} warm runs; the first run is cold"
    )
    for file, picture in zip(files, PICTURES, strict=True):
        _answer(model, processor, picture, pruners, output / file)
    _act(output / "overlay_policy.png")
    print(_NEXT)


def _convert(checkpoint: str) -> tuple[VisionModel, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        return load(convert(checkpoint, f"{scratch}/model"))


def _answer(
    model: VisionModel,
    processor: Processor,
    picture: Picture,
    pruners: Sequence[Pruner],
    file: Path,
) -> None:
    """Answer one question from all visual tokens and from half of them."""
    images = [load_image(picture.path)]
    print(f"\n{picture.path.name}: {picture.question} (right: {picture.answer})")

    def run(pruner: Pruner) -> Result:
        pieces = list(
            stream_generate(model, processor, images, picture.question, pruner=pruner)
        )
        last = pieces[-1]
        return last.ttft_ms, "".join(piece.text for piece in pieces), last.visual

    visual = _compare(run, pruners)
    write_picture(file, draw_overlay(images, visual.selection, visual.grid))
    print(f"  kept at {pruners[-1].keep_ratio:g}: {file}")


def _act(file: Path) -> None:
    """Predict one action of the demo policy from all visual tokens and half of them."""
    model, processor = _convert("demo-policy")
    images, instruction = [load_image(POLICY_FRAME.path)], POLICY_FRAME.question
    print(f"\n{POLICY_FRAME.path.name}: {instruction} (expert: {POLICY_FRAME.answer})")
    pruners = [Pruner("none" if r == 1 else POLICY_METHOD, r) for r in KEEP_RATIOS]

    def run(pruner: Pruner) -> Result:
        action = predict_action(model, processor, images, instruction, pruner=pruner)
        values = " ".join(f"{value:+.2f}" for value in action.values)
        return action.ttft_ms, values, action.visual

    visual = _compare(run, pruners)
    overlay = draw_overlay(images, visual.selection, visual.grid, padded=False)
    write_picture(file, overlay)
    print(f"  kept at {pruners[-1].keep_ratio:g}: {file}")


def _compare(
    run: Callable[[Pruner], Result], pruners: Sequence[Pruner]
) -> VisualTokens:
    """Print answers and times under each pruner; return the last pruner's tokens.

    Runs are interleaved, so that a machine that slows down slows all pruners.
    """
    cold = [run(pruner) for pruner in pruners]
    warm = [[run(pruner)[0] for pruner in pruners] for _ in range(RUNS)]
    for (first, answer, visual), *times in zip(cold, *warm, strict=True):
        ttft = statistics.median(times)
        print(f"  {visual.keep:3} of {visual.total} tokens: {answer}")
        print(f"      TTFT {ttft:.1f} ms warm ({first:.0f} ms cold)")
    return cold[-1][2]


if __name__ == "__main__":
    main()
