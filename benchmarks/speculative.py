"""Drafted action tokens in closed loop: how many calls they save, and how much time.

    python benchmarks/drafting.py [--model FOLDER] [--episodes 2] [--tasks NAME ...]

Runs the demo policy, or another of its tasks, in Meta-World (extra `sim`). Every frame
is given to a policy with drafts and to one without, in turns; their actions must be
equal, and the episode goes on with them. A call reads the weights of the language model
once, so calls are what a large policy's decoding time is made of.
"""

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict

import numpy as np

import mlx_tokprune
from mlx_tokprune import Policy, Pruner
from mlx_tokprune.train.policy.success import TEST_SEEDS
from mlx_tokprune.train.policy.worlds import HORIZON, TASKS, World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-policy")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    args = parser.parse_args()
    loaded = mlx_tokprune.load(args.model)
    pruner = Pruner("trimvla", keep_ratio=0.5)
    policies = {
        draft: Policy(*loaded, pruner=pruner, compile=False, draft=draft)
        for draft in (False, True)
    }
    calls, times, solved = Counter(), defaultdict(list), 0
    for task in args.tasks:
        for episode in range(args.episodes):
            world = World(task)
            world.reset(TEST_SEEDS + episode)
            for policy in policies.values():
                policy.reset()
            for step in range(HORIZON):
                frame, actions = world.frame(), {}
                order = sorted(policies, reverse=bool(step % 2))
                for draft in order:
                    start = time.perf_counter()
                    asked = ([frame], TASKS[task].instruction)
                    actions[draft] = policies[draft](*asked)
                    if step > 1:  # the first frames warm up, and have no draft
                        times[draft].append(time.perf_counter() - start)
                if not np.array_equal(*actions.values()):
                    sys.exit(f"{task}, episode {episode}, step {step}: other action")
                if step:
                    calls[policies[True].calls] += 1
                if world.step(actions[True]):
                    break
            solved += bool(world.success)
    total = sum(calls.values())
    plain = policies[False].calls
    mean = sum(number * count for number, count in calls.items()) / total
    shares = ", ".join(f"{k}: {calls[k] / total:.0%}" for k in sorted(calls))
    ratio = statistics.median(
        t / p for t, p in zip(times[True], times[False], strict=True)
    )
    print(
        f"{total} actions in {args.episodes} episodes of {len(args.tasks)} tasks, "
        f"{solved} solved, all actions equal; {mean:.2f} calls of the language model "
        f"for an action instead of {plain} ({shares}); {ratio:.2f} of the time"
    )


if __name__ == "__main__":
    main()
