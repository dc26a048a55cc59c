"""The whole path on the embedded models: convert, prune, generate or act, draw."""

import tempfile
from pathlib import Path

from .. import control
from ..act import DEFAULT_METHOD, predict_action
from ..answering import stream_generate
from ..commands import DEFAULT_POSITIONS, device_name
from ..convert import convert
from ..errors import Parser, command
from ..image import load_image
from ..loading import load
from ..overlay import draw_overlay
from ..pipeline import measure_stages
from ..pruners import Pruner
from . import CHECKPOINT, PICTURES, POLICY, POLICY_FRAME

KEEP_RATIOS = (1.0, 0.5)


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.demo", description=__doc__)
    add = parser.add_argument
    add("--output", default="demo-output", help="folder for overlays (made if missing)")
    add("--method", default="norm", help="pruning method")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    pruners = [Pruner(args.method, ratio) for ratio in KEEP_RATIOS]
    print(f"converting the embedded checkpoints, on {device_name()}")
    model, processor = _convert(CHECKPOINT)
    output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(PICTURES):
        images = [load_image(picture.path)]
        print(f"\n{picture.path.name}: {picture.question} (right: {picture.answer})")
        for pruner in pruners:
            asked = (images, picture.question)
            pieces = list(stream_generate(model, processor, *asked, pruner=pruner))
            visual = pieces[-1].visual
            stages = measure_stages(model, processor, *asked, pruner, DEFAULT_POSITIONS)
            answer = "".join(p.text for p in pieces)
            _print(visual.selection.keep, visual.total, answer, stages)
        path = output / f"overlay_{number}.png"
        draw_overlay(images, visual.selection, visual.grid).save(path)
        print(f"  kept at {pruners[-1].keep_ratio:g}: {path}")
    _act(output / "overlay_policy.png")


def _convert(checkpoint: Path):
    with tempfile.TemporaryDirectory() as scratch:
        return load(convert(str(checkpoint), f"{scratch}/model"))


def _act(path: Path) -> None:
    """One action of the demo policy, from all visual tokens and from half of them."""
    model, processor = _convert(POLICY)
    images, instruction = [load_image(POLICY_FRAME.path)], POLICY_FRAME.question
    print(f"\n{POLICY_FRAME.path.name}: {instruction} (expert: {POLICY_FRAME.answer})")
    for ratio in KEEP_RATIOS:
        pruner = Pruner("none" if ratio == 1 else DEFAULT_METHOD, ratio)
        asked = (model, processor, images, instruction)
        action = predict_action(*asked, pruner=pruner)
        stages = control.measure_stages(
            *(*asked, pruner, DEFAULT_POSITIONS, None, len(action.values))
        )
        patches = action.patches
        values = " ".join(f"{value:+.2f}" for value in action.values)
        _print(patches.indices.shape[1], patches.total, values, stages)
    overlay = draw_overlay(images, patches.selection, patches.grid, padded=False)
    overlay.save(path)
    print(f"  kept at {ratio:g}: {path}")


def _print(kept: int, total: int, answer: str, stages) -> None:
    times = ", ".join(f"{k} {v:.1f}" for k, v in vars(stages).items())
    print(f"  {kept:3} of {total} tokens: {answer}\n      {times} ms")


if __name__ == "__main__":
    main()
