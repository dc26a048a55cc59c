"""Pruning inside the language model equals masking from that layer on."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_tokprune import InputError, Policy, Pruner, predict_action, stream_generate
from mlx_tokprune.demo import PICTURES, POLICY_FRAME
from mlx_tokprune.image import load_image
from mlx_tokprune.models.language import LayerCache
from mlx_tokprune.pipeline import Scene, assemble, look, run
from mlx_tokprune.pruners import as_plan

QUESTION = PICTURES[0].question


@pytest.fixture(scope="module")
def picture():
    return load_image(PICTURES[0].path)


def scene_of(processor, images, text=QUESTION):
    return Scene(
        mx.array(processor.pixels(images)), processor.prompt(text, len(images))
    )


def masked_states(decoder, embeddings, hidden_from):
    """Last states of a full forward in which layers >= k do not see some tokens.

    hidden_from: by k, a bool array (T,) of tokens that nobody sees from there on.
    """
    length, h = embeddings.shape[1], embeddings
    seen = mx.tri(length, length, 0, mx.bool_)
    for number, layer in enumerate(decoder.layers):
        if number in hidden_from:
            # A hidden token sees itself, so that its row is no NaN.
            seen = seen & (~hidden_from[number][None] | mx.eye(length, dtype=mx.bool_))
        h = layer(h, seen[None, None], LayerCache(None, 0, mx.arange(length)))
    return decoder.norm(h[:, -1:])


def masked_answer(model, scene, choices, visual, steps):
    """First logits and greedy ids with the dropped tokens masked, step by step anew."""
    decoder, total = model.decoder, visual.keep
    sequence = assemble(model, scene, visual)
    where = np.concatenate([np.arange(s.start, s.stop) for s in sequence.visual])
    hidden, left = {}, np.arange(total * len(sequence.visual))
    for layer, selection in choices:
        kept = left[np.array(selection.indices[0])]
        gone, left = np.setdiff1d(np.arange(len(where)), kept), kept
        hidden[layer] = where[gone]
    embeddings, ids, first = sequence.embeddings, [], None
    for _ in range(steps):
        length = embeddings.shape[1]
        tokens = {k: mx.array(np.isin(np.arange(length), v)) for k, v in hidden.items()}
        logits = decoder.logits(masked_states(decoder, embeddings, tokens))[0, -1]
        first = logits if first is None else first
        ids.append(mx.argmax(logits).item())
        embeddings = mx.concatenate(
            [embeddings, decoder.embed(mx.array([ids[-1:]]))], axis=1
        )
    return first, ids


PLANS = [
    [Pruner("attention", 0.25, at=1)],
    [Pruner("norm", 0.5, at=2)],
    [Pruner("attention", 0.5, at=1), Pruner("attention", 0.5, at=2)],
]


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model_name", ["tiny", "demo"])
def test_dropping_equals_masking(request, picture, plan, pictures, model_name):
    model, processor = request.getfixturevalue(model_name)
    if plan[-1].at >= len(model.layers):
        pytest.skip("the tiny model has too few layers for this plan")
    images = [picture] * pictures
    scene = scene_of(processor, images)
    visual = look(model, scene, ())
    cache = model.decoder.make_cache()
    read, _ = run(model, scene, as_plan(plan), cache=cache)
    first, ids = masked_answer(model, scene, read.choices, visual, 6)
    logits = model.decoder.logits(read.hidden)[0, -1]
    assert float(mx.max(mx.abs(logits - first)) / mx.max(mx.abs(first))) < 1e-5
    # And on through mlx-lm's own generate_step, with caches of unequal lengths.
    lengths = [layer.inner.offset for layer in read.cache]
    assert lengths[0] > lengths[-1]
    pieces = stream_generate(
        model, processor, images, QUESTION, pruner=plan, max_tokens=6
    )
    found = [piece.token for piece in pieces]
    assert found == ids[: len(found)]


def test_chunks_do_not_matter(demo, picture):
    model, processor = demo
    scene = scene_of(processor, [picture])
    plan = (Pruner("attention", 0.25, at=2),)
    whole, _ = run(model, scene, plan, cache=model.decoder.make_cache())
    parts, _ = run(model, scene, plan, cache=model.decoder.make_cache(), step=7)
    np.testing.assert_allclose(whole.hidden, parts.hidden, atol=1e-4)
    assert mx.array_equal(whole.choices[0][1].indices, parts.choices[0][1].indices)


def test_places_compose_and_contiguous_positions_differ(demo, picture):
    model, processor = demo
    scene = scene_of(processor, [picture])
    plan = as_plan([Pruner("attention", 0.5, at=2), Pruner("norm", 0.5)])
    read, visual = run(model, scene, plan)
    assert [pruner.at for pruner in plan] == ["tower", 2]
    assert visual.keep == 32
    assert read.choices[0][1].keep == 16
    other, _ = run(model, scene, plan, positions="contiguous")
    assert float(mx.max(mx.abs(read.hidden - other.hidden))) > 1e-3


def test_policies_prune_inside_too(demo_policy):
    model, processor = demo_policy
    image, plan = load_image(POLICY_FRAME.path), [Pruner("attention", 0.5, at=2)]
    asked = ([image], POLICY_FRAME.question)
    alone = predict_action(model, processor, *asked, pruner=plan)
    policy = Policy(model, processor, pruner=plan)
    np.testing.assert_array_equal(policy(*asked), alone.values)
    drafting = Policy(model, processor, pruner=plan, draft=True)
    for _ in range(3):
        np.testing.assert_array_equal(drafting(*asked), alone.values)
    assert drafting.calls == 1
    batch = policy.act_on_batch([[image], [image]], POLICY_FRAME.question)
    np.testing.assert_array_equal(batch, np.stack([alone.values] * 2))


def test_oft_reads_its_slots_after_dropping(oft_policy):
    """The slots are counted from the end, so dropping must not move them."""
    model, processor = oft_policy
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (40, 40, 3), dtype=np.uint8) for _ in range(2)]
    how = {"proprio": [0.1] * 5, "unnorm_key": None}
    asked = (model, processor, images, "lift the block")
    whole = predict_action(*asked, **how)
    nearly = Pruner("attention", keep_tokens=whole.visual.total - 1, at=1)
    almost = predict_action(*asked, pruner=nearly, **how)
    assert np.abs(almost.normalized - whole.normalized).max() < 0.1
    assert almost.normalized.shape == whole.normalized.shape


@pytest.mark.parametrize(
    ("pruner", "words"),
    [
        (lambda: Pruner("norm", 0.5, at=0), "cannot prune at 0"),
        (lambda: Pruner("norm", 0.5, at="projector"), "cannot prune at 'projector'"),
        (lambda: Pruner("norm", 0.5, at=4), "cannot prune after layer 4 of 4"),
        (lambda: Pruner("spatial", 0.5, at=2), "needs grid"),
        (lambda: Pruner("trimvla", 0.5, at=2), "needs queries, text_keys"),
        (lambda: [Pruner("norm", 0.5), Pruner("attention", 0.5)], "both prune at"),
    ],
)
def test_places_that_cannot_be(demo, picture, pruner, words):
    with pytest.raises(InputError, match=words):
        stream_generate(*demo, [picture], QUESTION, pruner=pruner())
