"""Pruning inside the language model equals masking from that layer on."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_tokprune import (
    InputError,
    Policy,
    Pruner,
    Selection,
    predict_action,
    stream_generate,
)
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.models.positions import LayerCache
from mlx_tokprune.pipeline import Scene, assemble, look, run
from mlx_tokprune.pipeline.planning import plan_for
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import as_plan
from mlx_tokprune.pruners.registry import temporary

QUESTION = PICTURES[0].question


@pytest.fixture(scope="module")
def picture():
    return load_image(PICTURES[0].path)


def scene_of(processor, images, text=QUESTION):
    return Scene(
        mx.array(processor.pixels(images)), processor.prompt(text, len(images))
    )


def layer_inputs(decoder, embeddings, hidden_from, causal=True):
    """Return the inputs of each layer of a full forward, and its last output.

    hidden_from: by layer k, a bool array (T,) or (B, T) of tokens masked from layer k
    on. Every token keeps its position in the full sequence.
    """
    length, found = embeddings.shape[1], [(embeddings, None)]
    seen = mx.ones((1, length, length), mx.bool_)
    seen = seen & mx.tri(length, length, 0, mx.bool_) if causal else seen
    for number, layer in enumerate(decoder.layers):
        if number in hidden_from:
            gone = mx.array(hidden_from[number]).reshape(-1, 1, length)
            # A hidden token sees itself, so that its row is no NaN.
            seen = seen & (~gone | mx.eye(length, dtype=mx.bool_))
        h, _ = found[-1]
        found[-1] = (h, seen)
        part = LayerCache(None, 0, mx.arange(length))
        found.append((layer(h, seen[:, None], part), None))
    return found


def masked_states(decoder, embeddings, hidden_from, causal=True):
    """Return the last states of a full forward that masks tokens from layer k on."""
    (*_, (h, _)) = layer_inputs(decoder, embeddings, hidden_from, causal)
    return decoder.norm(h[:, -1:])


def masked_answer(model, scene, choices, visual, steps):
    """Return first logits and greedy ids, uncached, with dropped tokens masked."""
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
    [Pruner("fastv", 0.25)],
]


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model_name", ["tiny", "demo"])
def test_dropping_equals_masking(request, picture, plan, pictures, model_name):
    model, processor = request.getfixturevalue(model_name)
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


def gone_of(sequence, choices, row=0):
    """Return by layer a (T,) mask of the tokens that one sample has dropped."""
    where = np.concatenate([np.arange(s.start, s.stop) for s in sequence.visual])
    left, hidden = np.arange(len(where)), {}
    for layer, selection in choices:
        left = left[np.array(selection.indices[row])]
        seen = np.ones(sequence.embeddings.shape[1], bool)
        seen[where] = False
        seen[where[left]] = True
        hidden[layer] = ~seen
    return hidden


@pytest.mark.parametrize("step", [2048, 13])
@pytest.mark.parametrize(
    ("model_name", "plan"),
    [
        ("tiny", [Pruner("fastv", 0.25)]),
        ("tiny", [Pruner("norm", 0.5, at=1), Pruner("fastv", 9 / 32)]),
        ("demo_policy", [Pruner("fastv", 0.25)]),
        ("demo_policy", [Pruner("pyramiddrop", 0.5)]),
    ],
)
def test_each_row_of_a_batch_equals_masking(request, picture, model_name, plan, step):
    """Each row of a pruned batch equals masking its own dropped tokens."""
    model, processor = request.getfixturevalue(model_name)
    images = [picture, picture.rotate(180)]
    prompt = processor.prompt("What is it?", *([1] if model_name == "tiny" else []))
    scene, plan = Scene(mx.array(processor.pixels(images)), prompt, 2), plan
    plan = plan_for(model, plan)
    cache = model.decoder.make_cache()
    read, _ = run(model, scene, plan, cache=cache, step=step)
    chosen = read.choices[-1][1].indices
    assert not mx.array_equal(chosen[0], chosen[1])
    sequence = assemble(model, scene, look(model, scene, ()))
    rows = [gone_of(sequence, read.choices, row) for row in range(2)]
    gone = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    expected = masked_states(model.decoder, sequence.embeddings, gone)
    expected, found = (model.decoder.logits(h)[:, -1] for h in (expected, read.hidden))
    assert float(mx.max(mx.abs(found - expected)) / mx.max(mx.abs(expected))) < 1e-5
    assert mx.array_equal(mx.argmax(found, axis=-1), mx.argmax(expected, axis=-1))
    # And one token more, behind caches of other lengths.
    token = mx.argmax(found, axis=-1)[:, None]
    longer = mx.concatenate([sequence.embeddings, model.decoder.embed(token)], axis=1)
    gone = {k: np.pad(hidden, ((0, 0), (0, 1))) for k, hidden in gone.items()}
    expected = masked_states(model.decoder, longer, gone)
    found = model.decoder.follow(token, read.cache)
    assert float(mx.max(mx.abs(found - expected)) / mx.max(mx.abs(expected))) < 1e-5


CHUNKS = {"prefill_step_size": 13}
QUANTIZED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


@pytest.mark.parametrize(
    ("model_name", "how"),
    [
        ("tiny", CHUNKS),  # its keys are too short to be quantized
        ("demo", CHUNKS),
        ("demo", QUANTIZED),
        ("demo", QUANTIZED | CHUNKS | {"quantized_kv_start": 90}),
    ],
)
def test_fastv_equals_masking_however_it_is_read(request, picture, model_name, how):
    model, processor = request.getfixturevalue(model_name)
    scene, plan = scene_of(processor, [picture]), (Pruner("fastv", 0.25),)
    visual = look(model, scene, ())
    read, _ = run(model, scene, plan)
    _, ids = masked_answer(model, scene, read.choices, visual, 8)
    pieces = stream_generate(
        *(model, processor, [picture], QUESTION), pruner=plan, max_tokens=8, **how
    )
    found = [piece.token for piece in pieces]
    assert found == ids[: len(found)]


def test_a_quantized_cache_of_unequal_lengths_is_near_masking(demo, picture):
    """Decoding with an 8-bit cache after pruning is near to masking."""
    from mlx_lm.generate import maybe_quantize_kv_cache

    model, processor = demo
    scene, plan = scene_of(processor, [picture]), (Pruner("attention", 0.05, at=1),)
    decoder, after = model.decoder, mx.array([[11, 12, 13]])
    read, _ = run(model, scene, plan, cache=decoder.make_cache())
    cache = read.cache
    maybe_quantize_kv_cache(cache, 0, 32, 8)
    found = [model(after[:, i : i + 1], cache=cache)[0, -1] for i in range(3)]
    assert len({layer.inner.offset for layer in cache}) == 2
    assert {type(layer.inner).__name__ for layer in cache} == {"QuantizedKVCache"}
    sequence = assemble(model, scene, look(model, scene, ()))
    gone, embeddings = gone_of(sequence, read.choices), sequence.embeddings
    for number, logits in enumerate(found):
        embeddings = mx.concatenate(
            [embeddings, decoder.embed(after[:, number : number + 1])], axis=1
        )
        more = {k: np.pad(hidden, (0, number + 1)) for k, hidden in gone.items()}
        expected = decoder.logits(masked_states(decoder, embeddings, more))[0, -1]
        whole = decoder.logits(masked_states(decoder, embeddings, {}))[0, -1]
        near, far = (
            mx.max(mx.abs(logits - other)).item() for other in (expected, whole)
        )
        assert near < 0.03 * mx.max(mx.abs(expected)).item()
        assert near < 0.1 * far


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
    """Dropping one token in a layer keeps OFT's actions nearly equal."""
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


# Extras -----------------------------------------------------------------------------


EXTRAS = ("attention", "keys", "text", "text_attention")


@pytest.fixture
def looking():
    """Yield the inputs of a method that keeps the first tokens."""
    given = []
    with temporary("looking", needs=EXTRAS, seeded=True) as register:

        @register  # seeded ones are not compiled
        def looking(features, *, keep, seed=0):
            given.append(features)
            kept = mx.arange(keep, dtype=mx.int32)
            return Selection(mx.broadcast_to(kept, (len(features.tokens), keep)))

        yield given


def attended_by_hand(layer, hidden, seen):
    """Return (B, T, T) attention of a layer, mean over heads, positions in order."""
    attention, x = layer.self_attn, layer.input_layernorm(hidden)
    batch, length, _ = x.shape
    shape = (batch, length, -1, attention.q_proj(x).shape[-1] // attention.n_heads)
    queries, keys = (
        attention.rope.rope(project(x).reshape(shape).swapaxes(1, 2), offset=0)
        for project in (attention.q_proj, attention.k_proj)
    )
    queries, keys = np.array(queries, np.float64), np.array(keys, np.float64)
    each = queries.shape[1] // keys.shape[1]
    total = 0
    for head in range(queries.shape[1]):
        scores = queries[:, head] @ keys[:, head // each].swapaxes(1, 2)
        scores = scores / np.sqrt(queries.shape[-1])
        scores = np.where(np.array(seen), scores, -np.inf)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        total = total + powers / powers.sum(-1, keepdims=True)
    return total / queries.shape[1]


def check_extras(model, scene, before, given, layer, state_rows=0):
    """Compare the inputs of a method after `layer` layers with a full forward.

    before: the choices of earlier places. state_rows: the number of tokens behind
    the last prompt token.
    """
    decoder, sequence = model.decoder, assemble(model, scene, look(model, scene, ()))
    gone = gone_of(sequence, before)
    causal = model.attends == "causal"
    inputs = layer_inputs(decoder, sequence.embeddings, gone, causal)
    hidden, seen = inputs[layer - 1]
    last = sequence.embeddings.shape[1] - 1 - state_rows
    text = np.arange(sequence.visual[-1].stop, last + 1)
    where = np.concatenate([np.arange(s.start, s.stop) for s in sequence.visual])
    for _, selection in before:
        where = where[np.array(selection.indices[0])]
    attended = attended_by_hand(decoder.layers[layer - 1], hidden, seen)[0]
    one = decoder.layers[layer - 1]
    keys = one.self_attn.k_proj(one.input_layernorm(hidden))[0]
    after = np.array(inputs[layer][0][0])
    expected = {
        "attention": attended[last][where],
        "text_attention": attended[text][:, where],
        "keys": np.array(keys)[where],
        "text": after[text],
    }
    assert given.extras.keys() == expected.keys()
    for name, value in expected.items():
        found = np.array(given.extras[name][0])
        assert found.shape == value.shape
        scale = np.abs(value).max()
        np.testing.assert_allclose(found / scale, value / scale, atol=1e-5)
    np.testing.assert_allclose(given.tokens[0], after[where], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("step", [2048, 7])
def test_layers_give_what_a_full_forward_has(
    demo, picture, looking, layer, pictures, step
):
    model, processor = demo
    scene = scene_of(processor, [picture, picture.rotate(90)][:pictures])
    plan = (Pruner("looking", 0.5, at=layer),)
    run(model, scene, plan, cache=model.decoder.make_cache(), step=step)
    check_extras(model, scene, (), looking[0], layer)


@pytest.mark.parametrize("pictures", [1, 2])
def test_and_after_tokens_were_dropped(demo, picture, looking, pictures):
    model, processor = demo
    scene = scene_of(processor, [picture, picture.rotate(90)][:pictures])
    plan = plan_for(model, [Pruner("norm", 0.5, at=1), Pruner("looking", 0.25, at=3)])
    read, _ = run(model, scene, plan)
    check_extras(model, scene, read.choices[:1], looking[0], 3)
    assert looking[0].total == 32 * pictures


def test_slots_are_no_text(oft_policy, looking):
    """Slots are not part of the text extra; state and prompt are."""
    model, processor = oft_policy
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 255, (112, 112, 3), np.uint8)) for _ in range(2)
    ]
    state = mx.array([[0.1, -0.4, 0.9, 0.0, 0.3]])
    scene = observe(processor, [images], processor.prompt("lift the block"), state)
    head, plan = head_of(model, processor, 7), (Pruner("looking", 0.5, at=2),)
    head.decode(model, scene, plan)
    check_extras(model, scene, (), looking[0], 2, state_rows=22)
    words = len(scene.prompt.segments[-1])
    assert looking[0].extras["text"].shape[1] == 1 + words
