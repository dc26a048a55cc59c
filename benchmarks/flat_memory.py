"""Measure memory growth over thousands of calls: resident size and MLX arrays.

    python benchmarks/flat_memory.py --model tests/data/fastvlm-tiny --answers 10000

Prints the growth of each kind of call from the end of its first tenth to the last call.
Linux only.
"""

import argparse
import os
from collections.abc import Callable

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)
import mlx.core as mx
from tqdm import tqdm

from mlx_tokprune import Memory, Policy, Pruner, Temporal, generate, load
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.processing.image import load_image


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--policy", default="demo-policy")
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--others", type=int, default=1_000)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    print(f"mlx_tokprune {mlx_tokprune.__version__}, MLX {mx.__version__}")
    asked, pruner = load(args.model), Pruner("norm", 0.5)
    images = [load_image(picture.path) for picture in PICTURES]
    memory, frames = Memory(), Temporal(pruner)

    def answer(number: int, **how) -> None:
        question = f"What is at place {number % 7}?"
        generate(*asked, [images[number % 2]], question, max_tokens=3, **how)

    policy = Policy(*load(args.policy), pruner=Pruner("trimvla", 0.5))
    frame = load_image(POLICY_FRAME.path)
    measure("generate", args.answers, lambda n: answer(n, pruner=pruner))
    measure("Policy", args.others, lambda n: policy([frame], POLICY_FRAME.question))
    measure("Memory", args.others, lambda n: answer(n, pruner=pruner, memory=memory))
    measure("Temporal", args.others, lambda n: answer(n, vision=frames))


def measure(name: str, calls: int, call: Callable[[int], None]) -> None:
    early = None
    for number in tqdm(range(calls), desc=name, disable=None):
        call(number)
        if number == calls // 10:
            early = resident(), mx.get_active_memory()
    grown = [(b - a) / 1e6 for a, b in zip(early, (resident(), active()), strict=True)]
    print(
        f"{name}: {calls} calls, resident {resident() / 1e6:.0f} MB, grown by "
        f"{grown[0]:.1f} MB; MLX arrays grown by {grown[1]:.2f} MB",
        flush=True,
    )


def active() -> int:
    return mx.get_active_memory()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
