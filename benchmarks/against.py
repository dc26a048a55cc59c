"""Compare this package with another installation of it: TTFT, decoding and actions.

    python benchmarks/against.py --other OTHER/.venv/bin/python --runs 15
    python benchmarks/against.py --other ... --model FOLDER --runs 5

Each side is a process that holds its models. The sides take turns, so that a machine
that slows down slows both. Prints medians and the median of the ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME

SIDE = """
import json, sys, time
from mlx_tokprune import Policy, Pruner, load, stream_generate

folder, image, frame = sys.argv[1:]
model, processor = load(folder or "demo")
question = "What does the sign say?"
policies = {}
if not folder:
    acting = load("demo-policy")
    for name, pruner in (("none", None), ("trimvla 0.5", Pruner("trimvla", 0.5))):
        policies[f"Policy, {name}"] = Policy(*acting, pruner=pruner)


def answer(pruner):
    pieces = stream_generate(
        model, processor, [image], question, pruner=pruner, max_tokens=17
    )
    *_, last = pieces
    return last.ttft_ms, last.decode_tokens_per_second


for line in sys.stdin:
    found = {}
    for name, pruner in (("none", None), ("norm 0.5", Pruner("norm", 0.5))):
        ttft, rate = answer(pruner)
        found[f"TTFT, {name} (ms)"] = ttft
        if rate:
            found[f"decode, {name} (ms/token)"] = 1e3 / rate
    for name, policy in policies.items():
        start = time.perf_counter()
        policy([frame], "open the drawer")
        found[f"{name} (ms)"] = (time.perf_counter() - start) * 1e3
    print(json.dumps(found), flush=True)
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", required=True, help="its Python")
    parser.add_argument("--model", default="", help="folder (default: the demo models)")
    parser.add_argument("--image", default="", help="a picture (default: the demo's)")
    parser.add_argument("--runs", type=int, default=15)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    sides, image = [], str(Path(args.image or PICTURES[0].path).resolve())
    for python in (sys.executable, args.other):
        command = [python, "-c", SIDE, args.model, image, str(POLICY_FRAME.path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides.append(subprocess.Popen(command, cwd="/", **pipes))
    samples = [[], []]
    for number in range(args.runs + 2):
        order = (0, 1) if number % 2 else (1, 0)
        for side in order:
            found = _asked(sides[side])
            if number >= 2:  # the first two warm up
                samples[side].append(found)
    for side in sides:
        side.stdin.close()
        side.wait()
    print(f"n={args.runs}, interleaved; medians, and the median of the ratios")
    for name in samples[0][0]:
        ours, theirs = ([sample[name] for sample in side] for side in samples)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        quarter = len(ratios) // 4
        print(
            f"{name:32} this {statistics.median(ours):9.2f}  other "
            f"{statistics.median(theirs):9.2f}  ratio {statistics.median(ratios):.3f} "
            f"(middle half {ratios[quarter]:.3f}-{ratios[-1 - quarter]:.3f})"
        )


def _asked(side: subprocess.Popen) -> dict[str, float]:
    side.stdin.write("\n")
    side.stdin.flush()
    return json.loads(side.stdout.readline())


if __name__ == "__main__":
    main()
