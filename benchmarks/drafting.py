"""Measure the calls and the time that drafting saves for answers about images.

    python -m recipes.testbed
    python -m recipes.testbed.questions --pictures 8 --output asked
    python benchmarks/drafting.py --model testbed --data asked/questions.jsonl
    python benchmarks/drafting.py --model FOLDER --draft-model FOLDER --image FILE ...

Every question is answered without a draft and with each draft, in turns. The first
column counts the answers with equal tokens: a call that checks several tokens rounds
differently, so a tie can break differently. Times start after the first token, which a
draft does not change; they include the time that a draft model takes to encode the
image. A call of the language model reads its weights once, for any number of tokens.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

from mlx_tokprune import Pruner, stream_generate
from mlx_tokprune.evaluate.items import read_questions
from mlx_tokprune.generate.drafts import ModelDrafts, NgramDrafts, SelfDrafts
from mlx_tokprune.pruners import read_plan
from mlx_tokprune.runtime import device_name

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed

from recipes.testbed import family  # noqa: F401  (the model `testbed`)

PROMPTS = ("Describe the picture in detail.", "What can be done with the things here?")


def kinds(loaded, args) -> dict:
    """Return the drafts by name; `None` for no draft."""
    found = {"no draft": None, "n-gram, 8": NgramDrafts()}
    for ratio, count in ((1.0, 3), (args.draft_ratio, 3), (args.draft_ratio, 1)):
        pruner = Pruner("norm", ratio, at="prompt")
        found[f"itself at {ratio:.0%}, {count}"] = SelfDrafts(pruner, count)
    if args.draft_model:
        draft = mlx_tokprune.load(args.draft_model)
        for text in ("none", args.draft_prune):
            name = f"{args.draft_model}, {text}"
            found[name] = ModelDrafts(*draft, read_plan(text))
    return found


def answer(loaded, images, prompt, drafts, plan, most: int):
    """Return the tokens, and the calls and seconds after the first token."""
    asked = {"pruner": plan, "draft": drafts, "max_tokens": most}
    pieces, begun = [], 0.0
    for piece in stream_generate(*loaded, images, prompt, **asked):
        begun = begun or time.perf_counter()
        pieces.append(piece)
    spent = time.perf_counter() - begun
    return [piece.token for piece in pieces], pieces[-1].calls - 1, spent


def drawn(data: str, count: int) -> list:
    """Return the distinct images of `count` images' questions."""
    items = read_questions(data, count, None).items
    first = {item.picture: item for item in reversed(items)}
    return [item.load() for item in reversed(first.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--draft-model", help="a smaller one of the same tokens")
    parser.add_argument("--draft-prune", default="norm:0.25", help="its plan")
    parser.add_argument("--draft-ratio", type=float, default=0.25)
    parser.add_argument("--prune", default="none", help="the model's own plan")
    parser.add_argument("--image", nargs="+", help="in the place of --data")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    loaded, plan = mlx_tokprune.load(args.model), read_plan(args.prune)
    pictures = args.image or drawn(args.data, args.pictures)
    drafts, found = kinds(loaded, args), {}
    number = 0
    for picture in pictures:
        for prompt in args.prompts:
            order = list(drafts)[:: 1 if number % 2 else -1]
            asked = ([picture], prompt)
            some = {
                n: answer(loaded, *asked, drafts[n], plan, args.tokens) for n in order
            }
            for name, result in some.items():
                found.setdefault(name, []).append(result)
            number += 1
    report(found, f"{args.model}, {args.prune}; {device_name()}")


def report(found: dict, title: str) -> None:
    plain = found["no draft"]
    length = statistics.mean(len(tokens) - 1 for tokens, _, _ in plain)
    print(f"{title}; {len(plain)} answers of {length:.1f} tokens after the first\n")
    print("| draft | equal answers | tokens a call | time |\n|---|---:|---:|---:|")
    for name, results in found.items():
        pairs = list(zip(results, plain, strict=True))
        same = sum(own[0] == other[0] for own, other in pairs)
        tokens = sum(len(own[0]) - 1 for own in results)
        each = tokens / sum(calls for _, calls, _ in results)
        # Only equal answers have comparable times.
        ratios = [own[2] / other[2] for own, other in pairs if own[0] == other[0]]
        time_ = statistics.median(ratios)
        print(f"| {name} | {same}/{len(pairs)} | {each:.2f} | {time_:.2f} |")


if __name__ == "__main__":
    main()
