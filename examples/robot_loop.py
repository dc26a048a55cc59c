"""A control loop with a robot policy, with drafts of action tokens and without.

    python examples/robot_loop.py [--model FOLDER] [--steps 8] [--episodes 3]

No robot and no simulator: the embedded demo policy sees its stored frame, turned a
little further at every step, as if the camera moved. `--turn 0` shows the same frame
again and again, which is the best case of drafts. Nothing depends on the actions, so
this shows how the loop is written and what drafts save there, not whether the task is
done. Drafts are for policies that decode action tokens, as OpenVLA does.
"""

import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from mlx_tokprune import InputError, Policy, Pruner, load
from mlx_tokprune.checkpoints.embedded import POLICY_FRAME
from mlx_tokprune.cli import Parser, command
from mlx_tokprune.processing.image import load_image


@dataclass
class Episode:
    """What one episode gave. times: seconds of each action."""

    actions: list[np.ndarray] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help_ = "demo-policy, a folder or hub id (default: demo-policy)"
    add("--model", default="demo-policy", help=help_)
    add("--image", default=str(POLICY_FRAME.path), help="default: the demo's frame")
    add("--instruction", default=POLICY_FRAME.question)
    add("--unnorm-key", help="the data set whose units are wanted")
    add("--keep-ratio", type=float, default=0.5, help="for trimvla (default: 0.5)")
    add("--steps", type=int, default=8, help="actions of an episode (default: 8)")
    add("--episodes", type=int, default=3, help="timed ones (default: 3)")
    add("--turn", type=float, default=1.0, help="degrees for each step (default: 1)")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if min(args.steps, args.episodes) < 1:
        raise InputError("no steps or no episodes were asked for; the least is 1")
    loaded, pruner = load(args.model), Pruner("trimvla", args.keep_ratio)
    how = {"pruner": pruner, "unnorm_key": args.unnorm_key}
    policies = {
        "without drafts": Policy(*loaded, **how),
        "with drafts": Policy(*loaded, **how, draft=True),
    }
    picture = load_image(args.image)
    frames = [picture.rotate(args.turn * step) for step in range(args.steps)]
    done = play_in_turns(policies, frames, args.instruction, args.episodes)
    report(policies, done)


def play(policy: Policy, frames: list, instruction: str) -> Episode:
    """The control loop: reset, then look and act until the episode ends."""
    policy.reset()
    episode = Episode()
    for frame in frames:
        start = time.perf_counter()
        action = policy([frame], instruction)
        episode.times.append(time.perf_counter() - start)
        episode.actions.append(action)  # a robot would move here
        episode.calls.append(policy.calls)
    return episode


def play_in_turns(policies: dict, frames: list, instruction: str, episodes: int):
    """Episodes by policy, after one of each that compiles and is not counted."""
    for policy in policies.values():
        for _ in range(2):  # a draft, which has its own shape, comes with the second
            policy([frames[0]], instruction)
    done = {name: [] for name in policies}
    for _ in range(episodes):
        for name, policy in policies.items():
            done[name].append(play(policy, frames, instruction))
    return done


def report(policies: dict[str, Policy], done: dict[str, list[Episode]]) -> None:
    """The actions of an episode, whether all are alike, calls and actions/s."""
    plain, drafted = done.values()
    for step, action in enumerate(drafted[0].actions):
        values = " ".join(f"{value:+.2f}" for value in np.ravel(action))
        print(f"step {step}: {values}   {drafted[0].calls[step]} calls")
    pairs = zip(plain, drafted, strict=True)
    same = all(np.array_equal(p.actions, d.actions) for p, d in pairs)
    print(f"actions with drafts are {'the same' if same else 'DIFFERENT'}")
    for name, episodes in done.items():
        calls = statistics.mean(c for e in episodes for c in e.calls)
        rate = 1 / statistics.median(t for e in episodes for t in e.times)
        print(
            f"{name:15} {calls:.2f} calls per action, {rate:.1f} actions/s, "
            f"{policies[name].kept:g} visual tokens"
        )


if __name__ == "__main__":
    main()
