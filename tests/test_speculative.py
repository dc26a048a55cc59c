"""Drafted action tokens equal the tokens of plain decoding."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import InputError, Policy, Pruner
from mlx_tokprune.act.action_drafts import correct_draft, read_draft
from mlx_tokprune.act.heads import Bins
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.checkpoints.embedded import POLICY_FRAME
from mlx_tokprune.pipeline import Scene
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import as_plan

STEPS = 7


class Case:
    """Scene whose tokens are decoded one by one or with a draft."""

    def __init__(self, policy, scene, pruner=None, positions="original"):
        self.model, self.processor = policy
        self.scene, self.plan, self.positions = scene, as_plan(pruner), positions

    def decode(self) -> np.ndarray:
        head, asked = Bins(self.processor, STEPS), (self.model, self.scene, self.plan)
        parts, _ = head.decode(*asked, positions=self.positions)
        return np.array(head.joined(parts))

    def drafted(self, draft) -> tuple[np.ndarray, int]:
        draft, asked = mx.array(draft), (self.scene, self.plan, self.positions)
        checked = read_draft(self.model, *asked, draft)
        tokens, more = correct_draft(self.model, draft, checked)
        return np.array(tokens), 1 + more


def scene_of(processor, robots=1) -> Scene:
    frame = load_image(POLICY_FRAME.path)
    frames = [[frame.rotate(90 * number)] for number in range(robots)]
    return observe(processor, frames, processor.prompt("open the drawer"))


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize(
    "pruner",
    [Pruner("none"), Pruner("norm", 0.5), Pruner("attention", 0.5, at=1)],
    ids=["all", "tower", "layer"],
)
def test_any_draft_gives_the_same_tokens(demo_policy, pruner, positions):
    case = Case(demo_policy, scene_of(demo_policy[1]), pruner, positions)
    expected = case.decode()
    tokens, calls = case.drafted(expected)
    assert tokens.tolist() == expected.tolist()
    assert calls == 1
    other = (expected + 1) % 100
    tokens, calls = case.drafted(other)
    assert tokens.tolist() == expected.tolist()
    assert calls == STEPS
    for wrong in range(STEPS):
        draft = expected.copy()
        draft[0, wrong] = other[0, wrong]
        tokens, calls = case.drafted(draft)
        assert tokens.tolist() == expected.tolist()
        # The last number is never read: the model says it anyway.
        assert calls == (1 if wrong >= STEPS - 1 else 2)


def test_robots_agree_as_far_as_all_of_them_do(demo_policy):
    case = Case(demo_policy, scene_of(demo_policy[1], robots=3))
    expected = case.decode()
    draft = expected.copy()
    draft[0, 4] += 1
    draft[2, 2] += 1
    tokens, calls = case.drafted(draft)
    assert tokens.tolist() == expected.tolist()
    assert calls == 3


def test_no_draft_is_read_where_robots_have_padding(demo_policy):
    case = Case(demo_policy, scene_of(demo_policy[1], robots=2), Pruner("trimvla"))
    with pytest.raises(ValueError, match="only a causal or prefix sequence"):
        case.drafted(case.decode())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_policy_acts_the_same_with_drafts(demo_policy, compiled):
    frame = load_image(POLICY_FRAME.path)
    frames = [frame, frame, frame.rotate(3), frame.rotate(180), frame]
    pruner = Pruner("trimvla", keep_ratio=0.5)
    plain = Policy(*demo_policy, pruner=pruner, compile=compiled)
    policy = Policy(*demo_policy, pruner=pruner, compile=compiled, draft=True)
    for number, seen in enumerate(frames):
        expected = plain([seen], "open the drawer")
        steps = expected.shape[-1]
        assert plain.calls == steps
        found = policy([seen], "open the drawer")
        np.testing.assert_array_equal(found, expected)
        assert policy.kept == plain.kept
        assert policy.calls == (steps if number == 0 else policy.calls)
        assert 1 <= policy.calls <= steps
        assert number != 1 or policy.calls == 1
    policy.reset()
    policy([frames[0]], "open the drawer")
    assert policy.calls == steps


def test_a_draft_of_other_robots_is_not_used(demo_policy):
    frame = load_image(POLICY_FRAME.path)
    policy = Policy(*demo_policy, compile=False, draft=True)
    policy([frame], "open the drawer")
    policy.act_on_batch([[frame], [frame]], "open the drawer")
    assert policy.calls == 4
    policy.act_on_batch([[frame], [frame]], "open the drawer")
    assert policy.calls == 1


def test_policies_without_tokens_take_no_draft(oft_policy, demo_policy):
    with pytest.raises(InputError, match="drafts are for policies that decode tokens"):
        Policy(*oft_policy, draft=True)
    with pytest.raises(InputError, match="under a method with a budget"):
        Policy(*demo_policy, pruner=Pruner("lightvla"), draft=True)


def test_seven_tokens_of_the_golden_policy(tiny_policy):
    image, processor = load_image(TINY_POLICY / "image_0.png"), tiny_policy[1]
    scene = observe(processor, [[image]], processor.prompt("pick up the cup"))
    case = Case(tiny_policy, scene)
    expected = case.decode()
    draft = expected.copy()
    draft[0, 0] -= 1
    tokens, calls = case.drafted(draft)
    assert tokens.tolist() == expected.tolist()
    assert calls == 2
