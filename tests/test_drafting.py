"""Drafted action tokens are those that would have been decoded."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import InputError, Policy, Pruner, control, load
from mlx_tokprune.control import observe
from mlx_tokprune.demo import POLICY, POLICY_FRAME
from mlx_tokprune.drafting import correct_draft, read_draft
from mlx_tokprune.image import load_image

STEPS = 7


@pytest.fixture(scope="module")
def demo():
    return load(POLICY)


def sequence_of(model, processor, pruner, positions="original", robots=1):
    frame = load_image(POLICY_FRAME.path)
    frames = [frame.rotate(90 * number) for number in range(robots)]
    start, prompt = processor.prompt("open the drawer")
    pixels = mx.array(processor.pixels(frames))
    seen = control.Observation(pixels, start, mx.array(prompt))
    features = control.encode(model, seen, pruner.needs)
    patches = control.see(model, seen, pruner, features)
    return control.assemble(model, seen, patches, positions)


def decode(model, sequence) -> np.ndarray:
    return np.array(mx.stack(control.decode(model, sequence, STEPS), axis=1))


def drafted(model, sequence, draft) -> tuple[np.ndarray, int]:
    draft = mx.array(draft)
    greedy, layers = read_draft(model, sequence, draft)
    tokens, more = correct_draft(model, sequence, draft, greedy, layers)
    return np.array(tokens), 1 + more


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("pruner", [Pruner("none"), Pruner("norm", 0.5)])
def test_any_draft_gives_the_same_tokens(demo, pruner, positions):
    model, processor = demo
    sequence = sequence_of(model, processor, pruner, positions)
    expected = decode(model, sequence)
    tokens, calls = drafted(model, sequence, expected)
    assert tokens.tolist() == expected.tolist()
    assert calls == 1
    other = (expected + 1) % 100
    tokens, calls = drafted(model, sequence, other)
    assert tokens.tolist() == expected.tolist()
    assert calls == STEPS
    for wrong in range(STEPS):
        draft = expected.copy()
        draft[0, wrong] = other[0, wrong]
        tokens, calls = drafted(model, sequence, draft)
        assert tokens.tolist() == expected.tolist()
        # The last number is never read: the model says it anyway.
        assert calls == (1 if wrong >= STEPS - 1 else 2)


def test_robots_agree_as_far_as_all_of_them_do(demo):
    model, processor = demo
    sequence = sequence_of(model, processor, Pruner("none"), robots=3)
    expected = decode(model, sequence)
    draft = expected.copy()
    draft[0, 4] += 1
    draft[2, 2] += 1
    tokens, calls = drafted(model, sequence, draft)
    assert tokens.tolist() == expected.tolist()
    assert calls == 3


def test_a_mask_of_padding_is_kept(demo):
    model, processor = demo
    plain = sequence_of(model, processor, Pruner("norm", 0.5))
    keys = mx.ones(plain.embeddings.shape[:2], mx.bool_)
    keys[:, 5:9] = False
    sequence = control.Sequence(plain.embeddings, plain.positions, keys)
    expected = decode(model, sequence)
    draft = expected.copy()
    draft[0, 3] += 1
    assert drafted(model, sequence, draft)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_policy_acts_the_same_with_drafts(demo, compiled):
    frame = load_image(POLICY_FRAME.path)
    frames = [frame, frame, frame.rotate(3), frame.rotate(180), frame]
    pruner = Pruner("trimvla", keep_ratio=0.5)
    plain = Policy(*demo, pruner=pruner, compile=compiled)
    policy = Policy(*demo, pruner=pruner, compile=compiled, draft=True)
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


def test_a_draft_of_other_robots_is_not_used(demo):
    frame = load_image(POLICY_FRAME.path)
    policy = Policy(*demo, compile=False, draft=True)
    policy([frame], "open the drawer")
    policy.act_on_batch([[frame], [frame]], "open the drawer")
    assert policy.calls == 4
    policy.act_on_batch([[frame], [frame]], "open the drawer")
    assert policy.calls == 1


def test_policies_without_tokens_take_no_draft(oft_policy, demo):
    with pytest.raises(InputError, match="drafts are for policies that decode tokens"):
        Policy(*oft_policy, draft=True)
    with pytest.raises(InputError, match="under a method with a budget"):
        Policy(*demo, pruner=Pruner("lightvla"), draft=True)


def test_seven_tokens_of_the_golden_policy(tiny_policy):
    model, processor = tiny_policy
    image = load_image(TINY_POLICY / "image_0.png")
    seen = observe(processor, [image], "pick up the cup")
    features = control.encode(model, seen)
    patches = control.see(model, seen, Pruner("none"), features)
    sequence = control.assemble(model, seen, patches, "original")
    expected = decode(model, sequence)
    draft = expected.copy()
    draft[0, 0] -= 1
    tokens, calls = drafted(model, sequence, draft)
    assert tokens.tolist() == expected.tolist()
    assert calls == 2
