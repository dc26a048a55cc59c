"""Measure time and memory of a training step: LoRA and scorers.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B --dtype float16
    python benchmarks/training_step.py --model /tmp/FastVLM-0.5B
    python benchmarks/training_step.py --compile --steps 11 --batch 32 --questions 5

Each row is a process, with and without gradient checkpointing; by default a batch is
one generated image with one question. The first step also encodes the image, whose
features are kept, and is left out of the median. Memory is the process's peak, weights
and vision tower included. `--compile` times the two parts of a step, eager and under
`mx.compile`, in turn in one process: the loss with its gradients, whose batch is then a
constant, and the update of the weights.
"""

import argparse
import collections
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

import mlx.core as mx
import mlx.nn as nn

from mlx_tokprune import Pruner
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.lora import Adapter, train_adapter
from mlx_tokprune.train.samples import read_samples
from mlx_tokprune.train.scorer import Lesson, train_scorer


def train(args, step_of: Callable[[Loop, int], tuple[float, float]]) -> None:
    """Train `args.row` on generated images with `step_of` as the loop's step."""
    Loop._step = step_of
    model, samples = mlx_tokprune.load(args.model), read_samples("demo", args.batch)
    sizes, schedule = (args.batch, args.questions), Schedule(args.steps)
    with tempfile.TemporaryDirectory() as made:
        folders = (Path(made) / "state", Path(made) / "out")
        if args.row == "lora":
            asked = (Pruner("norm", 0.25), "original", Adapter(), sizes, schedule)
            how = {"checkpoint": args.grad_checkpoint}
            train_adapter(model, samples, *asked, *folders, **how)
        else:
            lesson = Lesson(args.steps, *sizes)
            asked = (model, args.row, samples, lesson, schedule)
            train_scorer(*asked, *folders, checkpoint=args.grad_checkpoint)


def measure(args) -> dict:
    """Return the seconds of each step, and the peak memory of the process in bytes."""
    times, untimed = [], Loop._step

    def timed(loop: Loop, step: int):
        start = time.perf_counter()
        result = untimed(loop, step)
        times.append(time.perf_counter() - start)
        return result

    train(args, timed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"times": times, "peak": peak}


def compare(args) -> dict:
    """Return seconds of both parts of each step but the first, eager and compiled."""
    times = collections.defaultdict(list)

    def timed(loop: Loop, step: int):
        total, count, gradients = loop._gradients(step)  # encodes new pictures

        def learn():
            mx.random.seed(step)
            sums = nn.value_and_grad(loop.module, loop.loss)
            return sums(loop.module, (0, step, 0), step)

        def update():
            loop._apply(gradients, count)

        for part, function in (("loss", learn), ("update", update)):
            state = [loop.module.state, loop.optimizer.state]
            compiled = mx.compile(function, inputs=state, outputs=state)
            mx.eval(compiled(), loop._state())  # traces
            ways = [("eager", function), ("compiled", compiled)]
            for way, call in ways[:: 1 if step % 2 else -1]:
                start = time.perf_counter()
                mx.eval(call(), loop._state())
                times[f"{part}, {way}"].append(time.perf_counter() - start)
        return (total / count).item(), count.item()

    train(args, timed)
    return {name: seconds[1:] for name, seconds in times.items()}


def print_compared(args) -> None:
    print("| trains | part | eager, ms | compiled, ms |\n|---|---|---:|---:|")
    for args.row in ("lora", "adaptive"):
        times = compare(args)
        for part in ("loss", "update"):
            eager, compiled = (
                1e3 * statistics.median(times[f"{part}, {way}"])
                for way in ("eager", "compiled")
            )
            print(f"| {args.row} | {part} | {eager:.1f} | {compiled:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="pictures in a batch")
    parser.add_argument("--questions", type=int, default=1, help="about each picture")
    parser.add_argument("--row", help="lora, adaptive or asking: only this, as JSON")
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--compile", action="store_true", help="eager and compiled")
    args = parser.parse_args()
    if args.compile:
        print_compared(args)
        return
    if args.row:
        print(json.dumps(measure(args)))
        return
    print("| trains | checkpoint | seconds a step | peak memory, GB |")
    print("|---|---|---:|---:|")
    for row in ("lora", "adaptive", "asking"):
        for flags in ([], ["--grad-checkpoint"]):
            asked = ["--model", args.model, "--steps", str(args.steps), "--row", row]
            asked += ["--batch", str(args.batch), "--questions", str(args.questions)]
            run = subprocess.run(
                [sys.executable, __file__, *asked, *flags],
                **{"capture_output": True, "text": True, "check": True},
            )
            found = json.loads(run.stdout.splitlines()[-1])
            seconds = statistics.median(found["times"][1:])
            shown = f"{seconds:.1f} | {found['peak'] / 1e9:.1f}"
            print(f"| {row} | {'yes' if flags else 'no'} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
