"""`vlapruner` in a `Policy`: the state of an episode, and its reset."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import InputError, Policy, Pruner, predict_action
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.checkpoints.embedded import POLICY_FRAME
from mlx_tokprune.models.positions import LayerCache, TokenPositions
from mlx_tokprune.pipeline import assemble, look, prune_at_prompt, run
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import read_plan

TOLD = POLICY_FRAME.question
VLAPRUNER = Pruner("vlapruner", keep_tokens=16)


@pytest.fixture(scope="module")
def frames():
    """Return images of one episode, each rotated 35 degrees further."""
    image = load_image(POLICY_FRAME.path)
    return [image.rotate(35 * number) for number in range(5)]


def scene_of(processor, robots, state=None):
    return observe(processor, robots, processor.prompt(TOLD), state)


def follow(policy, frames, **how) -> list[np.ndarray]:
    return [policy([frame], TOLD, **how) for frame in frames]


def attended_of(loaded, frame, **how) -> mx.array:
    """Return (1, N) attention of the first action of an episode."""
    policy = Policy(*loaded, pruner=VLAPRUNER, **how)
    policy([frame], TOLD)
    return policy._attended


# What is attended to ----------------------------------------------------------------


def by_hand(model, sequence, number: int, asking, own_key: bool) -> np.ndarray:
    """Return (len(asking), T) attention of one sample in a layer, mean over heads.

    own_key: whether a token attends to itself, and not only to earlier tokens.
    """
    hidden, layers = sequence.embeddings, model.decoder.layers
    length = hidden.shape[1]
    where = mx.arange(length) if sequence.positions is None else sequence.positions
    causal = model.attends == "causal"
    mask = mx.tri(length, length, 0, mx.bool_) if causal else None
    for layer in layers[:number]:
        hidden = layer(hidden, mask, LayerCache(None, 0, where))
    attention = layers[number].self_attn
    x = layers[number].input_layernorm(hidden)
    heads = (1, length, attention.n_heads, -1)
    at = TokenPositions(where)
    queries, keys = (
        np.array(attention.rope(p(x).reshape(heads).swapaxes(1, 2), offset=at))[0]
        for p in (attention.q_proj, attention.k_proj)
    )
    rows = []
    for token in asking:
        stop = length if not causal else token + own_key
        scores = np.einsum("hd,htd->ht", queries[:, token], keys[:, :stop])
        powers = np.exp(scores / np.sqrt(queries.shape[-1]))
        shares = (powers / powers.sum(-1, keepdims=True)).mean(0)
        rows.append(np.pad(shares, (0, length - stop)))
    return np.array(rows)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    "text", ["norm:1", "norm:0.5@tower+divprune:0.5@prompt", "norm:0.5@3"]
)
def test_tokens_note_what_they_attend_to(demo_policy, frames, layer, text):
    """The last prompt token and each decoded token record their attention."""
    model, processor = demo_policy
    scene = scene_of(processor, [[frames[1]]])
    plan, head = plan_for(model, read_plan(text)), head_of(model, processor, 4)
    parts, visual = head.decode(model, scene, plan, attention_of=layer)
    ids = head.joined(parts)
    read, seen = run(model, scene, plan, attention_of=layer)
    first = np.array(read.attended)
    assert read.attended.shape == (1, 1, seen.keep)
    np.testing.assert_array_equal(np.array(seen.attended), first)
    # Nothing is noted unless somebody asks.
    assert run(model, scene, plan)[0].attended is None

    kept = prune_at_prompt(model, scene, plan, look(model, scene, plan))
    sequence = assemble(model, scene, kept, plan)
    prompt = sequence.embeddings.shape[1]
    sequence = sequence.extended(model.decoder.embed(ids[:, :-1]))
    where = np.arange(sequence.visual[0].start, sequence.visual[0].stop)
    expected = np.concatenate(
        [
            by_hand(model, sequence, layer, [prompt - 1], own_key=True),
            by_hand(model, sequence, layer, range(prompt, prompt + 3), own_key=False),
        ]
    )[:, where]
    assert visual.attended.shape == (1, 4, len(where))
    found = np.array(visual.attended[0])
    if "@3" in text:  # later layers had fewer tokens, so what was said differs
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-6)
        assert found.shape[1] == 64
        return
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(first[0, 0], expected[0], rtol=1e-3, atol=1e-6)
    assert expected.max() > 2 * expected.min()


def test_a_cache_is_attended_to_by_the_tokens_before(demo_policy, frames):
    """Attention of a batch to a cache covers only the tokens of the cache."""
    model, processor = demo_policy
    decoder = model.decoder
    scene = scene_of(processor, [[frames[0]], [frames[2]]])
    read, _ = run(model, scene, cache=decoder.make_cache())
    after, seen = mx.array([[5, 9, 30], [7, 7, 40]]), {}

    def watch(number, hidden):
        part = read.cache[number]
        seen[number] = decoder.attention_to_cache(number, hidden, part)
        mx.eval(seen)

    decoder.follow(after[:, :1], read.cache, watch)
    assert list(seen) == [0, 1, 2, 3]
    sequence = assemble(model, scene, look(model, scene, ()))
    prompt = sequence.embeddings.shape[1]
    longer = sequence.extended(decoder.embed(after[:, :1]))
    for row in range(2):
        one = dataclasses.replace(longer, embeddings=longer.embeddings[row : row + 1])
        for number, found in seen.items():
            assert found.shape == (2, 1, prompt)
            expected = by_hand(model, one, number, [prompt], own_key=False)
            np.testing.assert_allclose(
                np.array(found[row]), expected[:, :prompt], rtol=1e-3, atol=1e-6
            )


def test_slots_note_what_they_attend_to(oft_policy, oft_pictures):
    model, processor = oft_policy
    state = mx.array([[0.1, -0.4, 0.9, 0.0, 0.3]])
    scene = scene_of(processor, [oft_pictures], state)
    _, visual = head_of(model, processor, 7).decode(model, scene, (), attention_of=1)
    sequence = assemble(model, scene, look(model, scene, ()))
    length = sequence.embeddings.shape[1]
    expected = by_hand(model, sequence, 1, range(length - 23, length), own_key=True)
    where = np.arange(sequence.visual[0].start, sequence.visual[0].stop)
    assert visual.attended.shape == (1, 23, 128)
    np.testing.assert_allclose(
        np.array(visual.attended[0]), expected[:, where], rtol=1e-3, atol=1e-6
    )


# Episodes ---------------------------------------------------------------------------


def test_three_steps_keep_all_and_later_ones_look_back(demo_policy, frames):
    model, processor = demo_policy
    policy, plan = Policy(*demo_policy, pruner=VLAPRUNER), (VLAPRUNER,)
    head = head_of(model, processor, 4)
    whole = Policy(*demo_policy)
    for frame in frames[:3]:
        np.testing.assert_array_equal(policy([frame], TOLD), whole([frame], TOLD))
        assert policy.kept == 64
    for frame in frames[3:]:
        scene, before = scene_of(processor, [[frame]]), policy._attended
        looking = dataclasses.replace(scene, extras={"scores_previous": before})
        parts, visual = head.decode(model, looking, plan)
        said = policy([frame], TOLD)
        assert policy.kept == visual.keep == 16
        values = head.normalized(np.array(head.joined(parts))[0])
        np.testing.assert_array_equal(said, policy.bounds.to_units(values))
        # Among them, candidates are the prompt's and those of the last actions.
        alone = prune_at_prompt(model, scene, plan, look(model, scene, plan))
        assert not mx.array_equal(alone.indices, visual.indices)


def test_what_is_attended_to_is_smoothed(demo_policy, frames):
    """The new attention is 0.8 times the old one plus 0.2 times the measured one."""
    policy = Policy(*demo_policy, pruner=VLAPRUNER)
    known = None
    for frame in frames[:3]:
        policy([frame], TOLD)
        new = attended_of(demo_policy, frame)
        known = new if known is None else 0.8 * known + 0.2 * new
        np.testing.assert_allclose(policy._attended, known, rtol=1e-4, atol=1e-7)
    assert policy._attended.shape == (1, 64)
    # Of a token that did not stay nothing new is known.
    policy([frames[3]], TOLD)
    ratio = np.array(policy._attended / known)
    assert (np.abs(ratio - 0.8) < 1e-5).sum() == 64 - 16


def test_the_first_attended_is_the_mean_over_an_action(demo_policy, frames):
    """The first attention is the mean over the action tokens in layer 2."""
    model, processor = demo_policy
    scene, head = scene_of(processor, [[frames[0]]]), head_of(model, processor, 4)
    found = attended_of(demo_policy, frames[0])
    _, visual = head.decode(model, scene, (), attention_of=2)
    expected = mx.mean(visual.attended, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    inside = [VLAPRUNER, Pruner("norm", 0.5, at=1)]
    policy = Policy(*demo_policy, pruner=inside)
    for frame in frames[:4]:
        policy([frame], TOLD)
    assert policy.kept == (16 + 3 * 8) / 4
    assert float(mx.max(policy._attended)) > 0


def test_reset_begins_another_episode(demo_policy, frames):
    policy = Policy(*demo_policy, pruner=VLAPRUNER)
    before = follow(policy, frames)
    policy.reset()
    again = []
    for number, frame in enumerate(frames):
        again.append(policy([frame], TOLD))
        assert policy.kept == (64 if number < 3 else 16)
    np.testing.assert_array_equal(again, before)


@pytest.mark.parametrize("text", ["vlapruner:6", "norm:0.5@tower+vlapruner:8"])
def test_a_batch_acts_as_its_robots_alone(demo_policy, frames, text):
    """A batch equals single robots, also after one robot has left."""
    plan = read_plan(text)
    together = Policy(*demo_policy, pruner=plan)
    alone = [Policy(*demo_policy, pruner=plan, compile=False) for _ in range(3)]
    robots = [0, 1, 2]
    for step in range(5):
        if step == 4:
            together.keep_robots([0, 2])
            robots = [0, 2]
        seen = [frames[(step + 2 * robot) % 5] for robot in robots]
        values = together.act_on_batch([[frame] for frame in seen], TOLD)
        assert len(values) == len(robots)
        for robot, frame, action in zip(robots, seen, values, strict=True):
            np.testing.assert_array_equal(alone[robot]([frame], TOLD), action)
        noted = mx.concatenate([alone[robot]._attended for robot in robots])
        np.testing.assert_allclose(together._attended, noted, rtol=1e-3, atol=1e-6)


def test_another_number_of_robots_is_refused(demo_policy, frames):
    policy = Policy(*demo_policy, pruner=VLAPRUNER)
    batch = [[frame] for frame in frames[:3]]
    policy.act_on_batch(batch, TOLD)
    words = "the episode has 3 robots, not 2; select the robots that continue"
    with pytest.raises(InputError, match=words):
        policy.act_on_batch(batch[:2], TOLD)
    policy.keep_robots([2, 0])
    policy.act_on_batch(batch[:2], TOLD)
    policy.reset()
    policy.act_on_batch(batch[:1], TOLD)


def test_drafts_do_not_look_back(demo_policy):
    with pytest.raises(InputError, match="does not look back; leave out draft"):
        Policy(*demo_policy, pruner=VLAPRUNER, draft=True)


def test_without_an_episode_the_prompt_alone_chooses(demo_policy, frames):
    model, processor = demo_policy
    action = predict_action(*demo_policy, [frames[0]], TOLD, pruner=VLAPRUNER)
    scene, plan = scene_of(processor, [[frames[0]]]), (VLAPRUNER,)
    kept = prune_at_prompt(model, scene, plan, look(model, scene, plan))
    trimvla = prune_at_prompt(
        model, scene, (Pruner("trimvla", 0.25),), look(model, scene, ())
    )
    assert action.visual.left() == kept.indices.tolist()
    assert mx.array_equal(kept.indices, trimvla.indices)  # as many as candidates


# Policies with slots ----------------------------------------------------------------


@pytest.fixture(scope="module")
def oft_pictures():
    image = load_image(TINY_POLICY / "image_0.png")
    return [image, image.rotate(90)]


def test_policies_with_slots_have_episodes(oft_policy, oft_pictures):
    how, few = {"proprio": [0.1] * 5}, Pruner("vlapruner", keep_tokens=6)
    policies = [
        Policy(*oft_policy, pruner=few, compile=compiled) for compiled in (True, False)
    ]
    whole = Policy(*oft_policy)(oft_pictures, TOLD, **how)
    for step in range(5):
        pictures = oft_pictures[:: 1 - 2 * (step % 2)]
        actions = [policy(pictures, TOLD, **how) for policy in policies]
        np.testing.assert_allclose(*actions, rtol=1e-3, atol=1e-4)
        assert actions[0].shape == (3, 7)
        assert policies[0].kept == (128 if step < 3 else 6)
        if step == 0:
            np.testing.assert_allclose(actions[0], whole, rtol=1e-3, atol=1e-4)
        assert policies[0]._attended.shape == (1, 128)
    both = Policy(*oft_policy, pruner=few)
    for step in range(5):
        pictures = oft_pictures[:: 1 - 2 * (step % 2)]
        batch = both.act_on_batch([pictures, pictures[::-1]], TOLD, [[0.1] * 5] * 2)
    np.testing.assert_allclose(batch[0], actions[0], rtol=1e-3, atol=1e-4)
