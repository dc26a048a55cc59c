"""What do several methods keep of a picture? One row of pictures says it.

    python examples/kept.py --image photo.jpg [--methods norm divprune fastv]

The picture as it is, and beside it what each method keeps at `--keep-ratio`, with the
answer under it. Methods that look at the question keep what belongs to that question.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mlx_tokprune import InputError, Pruner, load, stream_generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.cli import Parser, command
from mlx_tokprune.files import PICTURE, check_output, replacing, write_picture
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.overlay import draw_overlay

_SIDE, _LINE, _GAP = 280, 22, 10  # px of a picture, of a line of text, and between


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="demo", help="demo, a folder or hub id")
    add("--image", default=str(PICTURES[0].path), help="default: one of the demo's")
    add("--prompt", default=PICTURES[0].question)
    add("--methods", nargs="+", default=["norm", "divprune", "fastv", "random"])
    add("--keep-ratio", type=float, default=0.25, help="(default: 0.25)")
    add("--output", default="kept.png", help="the picture (default: kept.png)")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_output(args.output, PICTURE)
    if Path(args.output).suffix.lower() not in (".png", ".jpg"):
        raise InputError(f"{args.output} is no PNG or JPEG; choose such a name")
    image = load_image(args.image)
    asked = (*load(args.model), [image], args.prompt)
    panels = [(image, "all")]
    for pruner in [Pruner(method, args.keep_ratio) for method in args.methods]:
        pieces = list(stream_generate(*asked, pruner=pruner, max_tokens=16))
        visual, answer = pieces[-1].visual, "".join(p.text for p in pieces)
        kept = [np.array(group) for group in visual.left()]
        drawn = draw_overlay([image], kept, visual.grid)
        panels.append((drawn, pruner.method))
        print(f"{pruner.method}: {len(kept[0])} of {visual.total} tokens; {answer}")
    sheet = side_by_side(panels)
    if args.output.lower().endswith(".png"):
        write_picture(args.output, sheet)
    else:
        with replacing(args.output, PICTURE) as file:
            sheet.save(file, "JPEG", quality=88)
    print(f"drawn to {args.output}")


def side_by_side(panels: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures of one height in a row, each with its title above."""
    found = []
    for picture, title in panels:
        width = round(picture.width * _SIDE / picture.height)
        found.append((picture.resize((width, _SIDE), Image.Resampling.LANCZOS), title))
    width = sum(picture.width for picture, _ in found) + _GAP * (len(found) - 1)
    sheet, left = Image.new("RGB", (width, _SIDE + _LINE), "white"), 0
    draw = ImageDraw.Draw(sheet)
    for picture, title in found:
        draw.text((left + 2, 2), title, fill="black", font_size=15)
        sheet.paste(picture, (left, _LINE))
        left += picture.width + _GAP
    return sheet


if __name__ == "__main__":
    main()
