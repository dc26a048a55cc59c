"""Measure the calls and the time that drafted action tokens save in closed loop.

    python benchmarks/speculative.py [--model FOLDER] [--episodes 2] [--tasks NAME ...]
    python benchmarks/speculative.py --model demo-pi0 --first 4 --episodes 4 \
        --draft-ratio 0.25
    python benchmarks/random_checkpoint.py pi0-FAST pi0-4 --layers 4 --cameras 1
    python benchmarks/speculative.py --model demo-pi0 --first 4 --shape pi0-4

Runs a demo policy, or another policy for its tasks, in Meta-World (extra `sim`). Every
frame goes to policies with drafts and to one without, in turns; their actions must be
equal, and the episode continues with them. A call reads the weights of the language
model once, so the number of calls sets the decoding time of a large policy. The calls
of the drafter with `--draft-ratio` are not counted, but its time is.

shape: a checkpoint of another size. Calls with the same numbers of tokens are timed on
it with all its layers and with half of them; a straight line through both gives the
time of `--layers` layers. Only the sizes of the calls come from the episodes, because a
model with random weights accepts no drafts.
"""

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx
import numpy as np

from mlx_tokprune import Policy, Pruner
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import check_images, observe, tell
from mlx_tokprune.pipeline import run

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/ is not installed

from recipes.policy.collecting import state_of
from recipes.policy.success import TEST_SEEDS
from recipes.policy.worlds import HORIZON, TASKS, World

NAMES = {
    False: "no draft",
    True: "last answer",
    "shifted": "last answer, shifted",
    "ngram": "n-grams of the last answer",
    "self": "itself, pruned more",
}
# Tokens read by each call of an answer; for the first call, those after the prompt.
Calls = tuple[int, ...]


class Watched:
    """Policy that records its calls of the language model and its times."""

    def __init__(self, loaded, draft, first: int | None, pruner: Pruner):
        how = {"pruner": pruner, "compile": False, "draft": draft, "first": first}
        self.policy = Policy(*loaded, **how)
        self.times: list[float] = []
        self.counts: list[int] = []
        self.answers: list[Calls] = []
        self._decoder = loaded[0].decoder

    def __call__(self, *asked) -> np.ndarray:
        decoder, calls = self._decoder, []
        read, follow = decoder.read, decoder.follow

        def note_read(*args, **how):
            calls.append(how["rows"] - 1)
            return read(*args, **how)

        def note_follow(ids, *args):
            calls.append(ids.shape[1])
            return follow(ids, *args)

        decoder.read, decoder.follow = note_read, note_follow
        start = time.perf_counter()
        actions = self.policy(*asked)
        self.times.append(time.perf_counter() - start)
        del decoder.read, decoder.follow
        self.counts.append(self.policy.calls)
        self.answers.append(tuple(calls))
        return actions


def act(watched: dict, tasks: list[str], episodes: int) -> tuple[int, list[int]]:
    """Run the episodes with every policy.

    Return the number of solved episodes, and the index of the first answer of each
    episode, which has no previous answer to draft from.
    """
    solved, begun = 0, []
    for task in tasks:
        for episode in range(episodes):
            world = World(task)
            world.reset(TEST_SEEDS + 10_000 * list(TASKS).index(task) + episode)
            for one in watched.values():
                one.policy.reset()
            begun.append(len(watched[False].times))
            done = 0
            while done < HORIZON and not world.success:
                asked = ([world.frame()], TASKS[task].instruction)
                asked += state_of(watched[False].policy, world)
                order = list(watched)[:: 1 if done % 2 else -1]
                found = {draft: watched[draft](*asked) for draft in order}
                actions = found[False]
                if any(not np.array_equal(actions, other) for other in found.values()):
                    sys.exit(f"{task}, episode {episode}, step {done}: other actions")
                for action in np.atleast_2d(actions):
                    done += 1
                    if world.step(action):
                        break
            solved += bool(world.success)
    return solved, begun


def report(watched: dict, begun: list[int]) -> None:
    """Print calls, tokens per call and relative time of each draft.

    Leaves out the first answer of each episode, which has no draft, and the first two
    answers, which warm up.
    """
    plain = watched[False]
    rows = [n for n in range(2, len(plain.times)) if n not in begun]
    tokens = sum(plain.counts[n] for n in rows)
    print(f"{len(rows)} answers of {tokens / len(rows):.1f} tokens, in each a call")
    for draft, one in watched.items():
        if not draft:
            continue
        calls = Counter(one.counts[n] for n in rows)
        total = sum(count * number for number, count in calls.items())
        shares = ", ".join(f"{k}: {calls[k] / len(rows):.0%}" for k in sorted(calls))
        ratio = statistics.median(one.times[n] / plain.times[n] for n in rows)
        whole = sum(one.times[n] for n in rows) / sum(plain.times[n] for n in rows)
        print(
            f"{NAMES[draft]}: {total / len(rows):.2f} calls an answer ({shares}), "
            f"{tokens / total:.2f} tokens a call; {ratio:.2f} of the time (median of "
            f"{len(rows)}), {whole:.2f} of all of it"
        )


# Another size -------------------------------------------------------------------------


def time_calls(model, processor, widths: set[int], reads: set[int], runs: int):
    """Return median seconds by (kind, layers, tokens) of interleaved runs."""
    picture = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    images = check_images(model, [picture] * len(model.cameras))
    state = [0.0] * model.args.state_size
    size = len(processor.bounds("action", None).low)
    head = head_of(model, processor, size)
    about = tell(head, model, "pick up the cup", [state], None)
    scene = observe(processor, [images], *about)
    visual = mlx_tokprune.pipeline.look(model, scene, ())
    mx.eval(visual.embeddings)
    inner, found = model.language_model.model, defaultdict(list)
    whole = inner.layers
    for number in range(runs + 1):
        for layers in (len(whole) // 2, len(whole)):
            inner.layers = whole[:layers]
            for rows in sorted(reads):
                cache = model.decoder.make_cache()
                after = {"after": mx.zeros((1, rows), mx.int32)} if rows else {}
                seen = {"vision": lambda *_: visual, "cache": cache}
                start = time.perf_counter()
                read, _ = run(model, scene, (), **seen, **after)
                mx.eval(mx.argmax(model.decoder.logits(read.hidden), axis=-1))
                spent = time.perf_counter() - start
                found["read", layers, rows] += [spent] if number else []
            for width in sorted(widths):
                ids = mx.zeros((1, width), mx.int32)
                start = time.perf_counter()
                hidden = model.decoder.follow(ids, read.cache)
                mx.eval(mx.argmax(model.decoder.logits(hidden), axis=-1))
                spent = time.perf_counter() - start
                for part in read.cache:
                    part.inner.trim(width)
                found["follow", layers, width] += [spent] if number else []
        inner.layers = whole
    return {key: statistics.median(values) for key, values in found.items()}


def scale(times: dict, layers: int) -> dict:
    """Return seconds by (kind, tokens) with `layers` layers, extrapolated linearly."""
    less, more = sorted({depth for _, depth, _ in times})
    found = {}
    for kind, depth, count in times:
        if depth == more:
            low, high = times[kind, less, count], times[kind, more, count]
            each = (high - low) / (more - less)
            found[kind, count] = high + each * (layers - more)
    return found


def report_shape(folder: str, watched: dict, begun: list[int], layers, runs) -> None:
    plain = watched[False]
    rows = [n for n in range(2, len(plain.times)) if n not in begun]
    watched = {d: one for d, one in watched.items() if d != "self"}
    answers = {d: [one.answers[n] for n in rows] for d, one in watched.items()}
    every = [calls for some in answers.values() for calls in some]
    model, processor = mlx_tokprune.load(folder)
    # Few sizes are timed; times of other sizes are interpolated.
    widths = {1, max(w for calls in every for w in calls[1:])}
    reads = {0, max(calls[0] for calls in every)}
    times = scale(time_calls(model, processor, widths, reads, runs), layers)

    def seconds(calls: Calls) -> float:
        known = {kind: sorted(n for k, n in times if k == kind) for kind, _ in times}
        kinds = ["read", *["follow"] * (len(calls) - 1)]
        points = {k: [times[k, n] for n in known[k]] for k in known}
        return sum(
            float(np.interp(n, known[k], points[k]))
            for k, n in zip(kinds, calls, strict=True)
        )

    shown = {
        f"{kind} {count}": f"{s * 1e3:.0f} ms" for (kind, count), s in times.items()
    }
    print(f"{folder}, scaled to {layers} layers, n={runs}: {shown}")
    whole = {draft: sum(map(seconds, some)) for draft, some in answers.items()}
    for draft, spent in whole.items():
        print(
            f"{NAMES[draft]}: {spent / len(rows):.2f} s an answer without the tower, "
            f"{spent / whole[False]:.2f} of the time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-policy")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--method", default="trimvla")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    help_ = "of what the policy sees where it drafts for itself, by trimvla"
    parser.add_argument("--draft-ratio", type=float, help=help_)
    help_ = "actions of a chunk that are done before looking again"
    parser.add_argument("--first", type=int, help=help_)
    parser.add_argument("--shape", help="folder of a policy of another size")
    help_ = "to which the shape is scaled (default: 18, as Gemma 2B has)"
    parser.add_argument("--layers", type=int, default=18, help=help_)
    parser.add_argument("--runs", type=int, default=3, help="of each size of a call")
    args = parser.parse_args()
    loaded = mlx_tokprune.load(args.model)
    pruner = Pruner(args.method, None if args.method == "none" else args.keep_ratio)
    drafts = {draft: draft for draft in (False, True)}
    if loaded[0].answers == "chunks":
        drafts |= {"shifted": "shifted", "ngram": "ngram"}
    if args.draft_ratio:
        less = Pruner("trimvla", args.draft_ratio)
        drafts["self"] = Policy(*loaded, pruner=less, compile=False)
    watched = {n: Watched(loaded, d, args.first, pruner) for n, d in drafts.items()}
    solved, begun = act(watched, args.tasks, args.episodes)
    print(
        f"{args.model}, {args.method}: {len(watched[False].times)} answers in "
        f"{len(begun)} episodes, {solved} solved, all actions equal"
    )
    report(watched, begun)
    if args.shape:
        report_shape(args.shape, watched, begun, args.layers, args.runs)


if __name__ == "__main__":
    main()
