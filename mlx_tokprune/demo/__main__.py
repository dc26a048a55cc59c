"""The whole path on the embedded models: convert, prune, generate or act, draw."""

import tempfile
from pathlib import Path

from ..act.predict import predict_action
from ..checkpoints.embedded import PICTURES, POLICY_FRAME
from ..checkpoints.loading import load
from ..cli import Parser, command
from ..convert import convert
from ..generate.stream import stream_generate
from ..processing.image import load_image
from ..processing.overlay import draw_overlay
from ..pruners import DEFAULT_METHOD, POLICY_METHOD, Pruner
from ..runtime import device_name

KEEP_RATIOS = (1.0, 0.5)


def build_parser() -> Parser:
    parser = Parser(prog="mlx_tokprune.demo", description=__doc__)
    add = parser.add_argument
    add("--output", default="demo-output", help="folder for overlays (made if missing)")
    add("--method", default=DEFAULT_METHOD, help="pruning method")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    pruners = [Pruner(args.method, ratio) for ratio in KEEP_RATIOS]
    print(f"converting the embedded checkpoints, on {device_name()}")
    model, processor = _convert("demo")
    output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(PICTURES):
        images = [load_image(picture.path)]
        print(f"\n{picture.path.name}: {picture.question} (right: {picture.answer})")
        for pruner in pruners:
            asked = (images, picture.question)
            how = {"pruner": pruner, "stages": True}
            pieces = list(stream_generate(model, processor, *asked, **how))
            visual = pieces[-1].visual
            answer = "".join(p.text for p in pieces)
            _print(visual.keep, visual.total, answer, pieces[-1].stages_ms)
        path = output / f"overlay_{number}.png"
        draw_overlay(images, visual.selection, visual.grid).save(path)
        print(f"  kept at {pruners[-1].keep_ratio:g}: {path}")
    _act(output / "overlay_policy.png")


def _convert(checkpoint: str):
    with tempfile.TemporaryDirectory() as scratch:
        return load(convert(checkpoint, f"{scratch}/model"))


def _act(path: Path) -> None:
    """One action of the demo policy, from all visual tokens and from half of them."""
    model, processor = _convert("demo-policy")
    images, instruction = [load_image(POLICY_FRAME.path)], POLICY_FRAME.question
    print(f"\n{POLICY_FRAME.path.name}: {instruction} (expert: {POLICY_FRAME.answer})")
    for ratio in KEEP_RATIOS:
        pruner = Pruner("none" if ratio == 1 else POLICY_METHOD, ratio)
        asked = (model, processor, images, instruction)
        action = predict_action(*asked, pruner=pruner, stages=True)
        visual = action.visual
        values = " ".join(f"{value:+.2f}" for value in action.values)
        _print(visual.keep, visual.total, values, action.stages_ms)
    overlay = draw_overlay(images, visual.selection, visual.grid, padded=False)
    overlay.save(path)
    print(f"  kept at {ratio:g}: {path}")


def _print(kept: int, total: int, answer: str, stages: dict[str, float]) -> None:
    times = ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items())
    print(f"  {kept:3} of {total} tokens: {answer}\n      {times} ms")


if __name__ == "__main__":
    main()
