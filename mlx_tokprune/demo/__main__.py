"""The whole path on the embedded model: convert, prune, generate, draw."""

import tempfile
from pathlib import Path

from ..commands import DEFAULT_POSITIONS, device_name
from ..convert import convert
from ..errors import Parser, command
from ..generate import stream_generate
from ..image import load_image
from ..loading import load
from ..overlay import draw_overlay
from ..pipeline import measure_stages
from ..pruners import Pruner
from . import CHECKPOINT, PICTURES

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
    with tempfile.TemporaryDirectory() as scratch:
        print(f"converting the embedded checkpoint, on {device_name()}")
        model, processor = load(convert(str(CHECKPOINT), f"{scratch}/model"))
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
            print(f"  {visual.selection.keep:3} of {visual.total} tokens: {answer}")
            times = ", ".join(f"{k} {v:.1f}" for k, v in vars(stages).items())
            print(f"      {times} ms")
        path = output / f"overlay_{number}.png"
        draw_overlay(images, visual.selection, visual.grid).save(path)
        print(f"  kept at {pruners[-1].keep_ratio:g}: {path}")


if __name__ == "__main__":
    main()
