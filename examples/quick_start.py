"""Ask about a picture with all of its visual tokens, and with half of them.

    python examples/quick_start.py [--model FOLDER] [--image FILE] [--prompt TEXT]

Asks without pruning, then with `norm` before the projector, then with FastV (attention
inside the language model, after its second layer), and at last asks another question of
a picture that a `Memory` knows. Times are medians of 3 warm runs. Without arguments it
uses the embedded demo model and its pictures.
"""

import statistics

from mlx_tokprune import Memory, Pruner, load, stream_generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.cli import Parser, command

PRUNERS = {
    "every token": None,
    "norm": Pruner("norm", keep_ratio=0.5),
    "FastV": Pruner("attention", keep_ratio=0.5, at=2),
}


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="demo", help="demo, a folder or hub id (default: demo)")
    add("--image", help="a picture (default: those of the demo)")
    add("--prompt", help="a question (default: that of the demo's picture)")
    help_ = "another question about the same picture"
    add("--second", default="How many shapes are there?", help=help_)
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    loaded = load(args.model)
    pictures = [(p.path, args.prompt or p.question) for p in PICTURES]
    if args.image:
        pictures = [(args.image, args.prompt or "What is in this picture?")]
    for image, prompt in pictures:
        show(loaded, image, prompt, args.second)


def show(loaded, image, prompt: str, second: str) -> None:
    """The same question three times, then another one through a memory."""
    print(f"\n{image}: {prompt}")
    for name, pruner in PRUNERS.items():
        ask(loaded, image, prompt, pruner)  # the first run of a shape is a slow one
        print(row(name, pruner, [ask(loaded, image, prompt, pruner) for _ in range(3)]))
    memory, pruner = Memory(), PRUNERS["norm"]
    ask(loaded, image, prompt, pruner, memory)
    runs = [ask(loaded, image, second, pruner, memory) for _ in range(3)]
    print(f"Asked next, of the same picture: {second}")
    print(row(f"norm, {runs[0][-1].reused} tokens known", pruner, runs))


def ask(loaded, image, prompt: str, pruner, memory: Memory | None = None) -> list:
    """The pieces of an answer; every one has the figures."""
    asked, how = (*loaded, [image], prompt), {"pruner": pruner, "memory": memory}
    return list(stream_generate(*asked, **how, max_tokens=64))


def row(name: str, pruner: Pruner | None, runs: list[list]) -> str:
    """A line of the report."""
    answer = "".join(piece.text for piece in runs[0])
    ttft = statistics.median(pieces[0].ttft_ms for pieces in runs)
    kept = runs[0][0].visual.keep
    if pruner is not None and pruner.place == "layer":  # drops tokens later than that
        kept = f"{pruner.count(kept)} from layer {pruner.at} on"
    return f"  {name:24}kept {kept!s:20}TTFT {ttft:7.1f} ms   {answer}"


if __name__ == "__main__":
    main()
