"""Time and memory of a training step: LoRA and scorers, with and without checkpoint.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B --dtype float16
    python benchmarks/training_step.py --model /tmp/FastVLM-0.5B

Each row is a process of its own: one picture with one question a batch, generated. The
first step also encodes the picture, whose features are kept, and is left out of the
median. Memory is the process's largest, weights and the vision tower included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)

from mlx_tokprune import Pruner
from mlx_tokprune.train.loop import Loop, Schedule
from mlx_tokprune.train.lora import Adapter, train_adapter
from mlx_tokprune.train.samples import read_samples
from mlx_tokprune.train.scorer import Lesson, train_scorer


def train(model: str, what: str, checkpoint: bool, steps: int) -> dict:
    """Seconds of each step, and the largest size of the process in bytes."""
    times = []

    def timed(loop: Loop, step: int):
        start = time.perf_counter()
        result = untimed(loop, step)
        times.append(time.perf_counter() - start)
        return result

    untimed, Loop._step = Loop._step, timed
    loaded, samples = mlx_tokprune.load(model), read_samples("demo", 1)
    schedule = Schedule(steps)
    with tempfile.TemporaryDirectory() as made:
        folders = (Path(made) / "state", Path(made) / "out")
        if what == "lora":
            asked = (Pruner("norm", 0.25), "original", Adapter(), (1, 1), schedule)
            train_adapter(loaded, samples, *asked, *folders, checkpoint=checkpoint)
        else:
            lesson = Lesson(steps, pictures=1, questions=1)
            asked = (loaded, what, samples, lesson, schedule)
            train_scorer(*asked, *folders, checkpoint=checkpoint)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"times": times, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--row", help="lora, adaptive or asking: only this, as JSON")
    parser.add_argument("--grad-checkpoint", action="store_true")
    args = parser.parse_args()
    if args.row:
        found = train(args.model, args.row, args.grad_checkpoint, args.steps)
        print(json.dumps(found))
        return
    print("| trains | checkpoint | seconds a step | peak memory, GB |")
    print("|---|---|---:|---:|")
    for row in ("lora", "adaptive", "asking"):
        for flags in ([], ["--grad-checkpoint"]):
            asked = ["--model", args.model, "--steps", str(args.steps), "--row", row]
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
