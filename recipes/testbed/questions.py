"""Write questions of the test bed: `python -m recipes.testbed.questions`.

The folder has pictures and `questions.jsonl`, for `evaluate --data` and `train --data`.
Things and backgrounds of the split `test` are not in the training of the test bed.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from mlx_tokprune.cli import Parser, command
from mlx_tokprune.errors import InputError

from ..questions import write_questions
from . import scenes
from .things import SPLITS, stock

# The seed of a picture has its number after the first of these, and before the second.
SEEDS = {"test": ((12,), ()), "train": ((1, 777), (2,))}
ROUNDS = {"test": 1, "train": 2}  # of one question of each kind


def build_parser() -> Parser:
    parser = Parser(prog="recipes.testbed.questions", description=__doc__)
    add = parser.add_argument
    add("--split", choices=SPLITS, default="test", help="split (default: test)")
    help_ = "number of pictures (default: 64)"
    add("--pictures", type=int, metavar="N", default=64, help=help_)
    help_ = "folder to write; must not exist"
    add("--output", required=True, metavar="FOLDER", help=help_)
    return parser


def draw_questions(
    split: str, pictures: int
) -> Iterator[tuple[Image.Image, list[dict]]]:
    """Yield each picture with its questions, for `write_questions`."""
    before, after = SEEDS[split]
    for number in range(pictures):
        rng = np.random.default_rng((*before, number, *after))
        scene = scenes.sample_scene(rng, split)
        asked = [q for _ in range(ROUNDS[split]) for q in scenes.ask(rng, scene)]
        unique = {(question.prompt, question.answer): question for question in asked}
        yield scene.draw(), [_fields(question) for question in unique.values()]


def _fields(question: scenes.Question) -> dict:
    fields = {"question": question.prompt, "answer": question.answer}
    needed = scenes.covered(question.needed)
    return {**fields, "kind": question.kind, "needed": needed}


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.pictures < 1:
        raise InputError("pictures is a whole number from 1")
    stock(args.split)
    lines = write_questions(draw_questions(args.split, args.pictures), args.output)
    print(f"wrote {lines}")


if __name__ == "__main__":
    main()
