"""OpenVLA against what the reference implementation computed in float32."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import control, load
from mlx_tokprune.act import main, predict_action
from mlx_tokprune.convert import convert
from mlx_tokprune.image import load_image
from mlx_tokprune.policy import Policy
from mlx_tokprune.pruners import Pruner

METHODS = ("norm", "mean_similarity")
CASES = [("none", ""), *((m, b) for m in METHODS for b in ("50", "25"))]
INSTRUCTION = "pick up the cup"
PICTURE = TINY_POLICY / "image_0.png"


@pytest.fixture(scope="module")
def expected():
    return mx.load(str(TINY_POLICY / "expected.safetensors"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(str(TINY_POLICY), str(tmp_path_factory.mktemp("mlx") / "tiny"))


def relative(a, b) -> float:
    a, b = np.array(a), np.array(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def look(processor, *pictures) -> control.Observation:
    images = [load_image(picture) for picture in pictures or (PICTURE,)]
    return control.observe(processor, images, INSTRUCTION)


def pruner_of(method: str, budget: str) -> Pruner:
    return Pruner(method, int(budget) / 100 if budget else None)


def test_pixels_and_prompt_equal_the_reference(tiny_policy, expected):
    model, processor = tiny_policy
    observation = look(processor)
    towers = zip(model.args.means, model.args.stds, strict=True)
    both = [(observation.pixels - mx.array(m)) / mx.array(s) for m, s in towers]
    ours = mx.concatenate(both, axis=-1)[:, ::8, ::8].transpose(0, 3, 1, 2)
    assert mx.array_equal(ours, expected["pixel_values"])
    ids = [observation.start, *observation.prompt.tolist()]
    assert ids == expected["input_ids"].tolist()


def test_towers_and_projector_equal_the_reference(tiny_policy, expected):
    model, processor = tiny_policy
    features = control.encode(model, look(processor))
    assert features.attention is None
    assert relative(features.tokens[..., :48], expected["dinov2_features"]) < 1e-4
    assert relative(features.tokens[..., 48:], expected["siglip_features"]) < 1e-4
    assert relative(model.project(features.tokens), expected["projected"]) < 1e-4


@pytest.mark.parametrize(("method", "budget"), CASES)
def test_logits_equal_the_reference(tiny_policy, expected, method, budget):
    model, processor = tiny_policy
    name = f"{method}_{budget}_" if budget else ""
    observation = look(processor)
    features = control.encode(model, observation)
    patches = control.see(model, observation, pruner_of(method, budget), features)
    sequence = control.assemble(model, observation, patches, "contiguous")
    logits = model(None, input_embeddings=sequence.embeddings)[0, -8:]
    assert relative(logits, expected[f"{name}logits"]) < 1e-4


@pytest.mark.parametrize(("method", "budget"), CASES)
def test_command_line_equals_the_reference(converted, expected, capsys, method, budget):
    name = f"{method}_{budget}_" if budget else ""
    keep = ["--keep-ratio", str(int(budget) / 100)] if budget else []
    main(
        [
            *("--model", str(converted), "--image", str(PICTURE), "--json"),
            *("--instruction", INSTRUCTION, "--method", method, *keep),
            *("--positions", "contiguous", "--runs", "1"),
        ]
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["token_ids"] == expected[f"{name}greedy_ids"].tolist()
    np.testing.assert_allclose(record["action"], expected[f"{name}action"], atol=1e-5)
    if budget:
        assert record["kept_indices"][0] == expected[f"{name}indices"].tolist()


def test_attention_of_the_class_token_is_what_the_block_computes(tiny_policy):
    model, processor = tiny_policy
    observation = look(processor)
    features = control.encode(model, observation, ("attention",))
    tower = model.vision_backbone.featurizer
    mean, std = (mx.array(x[0]) for x in (model.args.means, model.args.stds))
    x = tower._embed((observation.pixels - mean) / std)
    for block in tower.blocks[:-1]:
        x = block(x)
    attention = tower.blocks[-1].attn
    normed = tower.blocks[-1].norm1(x)
    qkv = np.array(attention.qkv(normed))[0].reshape(-1, 3, 4, 12)
    total = np.zeros(64)
    for head in range(4):
        logits = qkv[:, 1, head] @ qkv[0, 0, head] / np.sqrt(12)
        weights = np.exp(logits - logits.max())
        total += (weights / weights.sum())[5:] / 4
    np.testing.assert_allclose(np.array(features.attention)[0], total, rtol=1e-4)


def hidden_under_a_mask(model, observation, patches, bidirectional: bool):
    """Nothing dropped, but the dropped visual tokens hidden from everybody."""
    features = control.encode(model, observation)
    whole = control.see(model, observation, Pruner("none"), features)
    sequence = control.assemble(model, observation, whole, "original")
    length = sequence.embeddings.shape[1]
    keep = np.zeros(length, bool)
    keep[0] = keep[1 + whole.total :] = True
    keep[1 + np.array(patches.indices[0])] = True
    mask = np.broadcast_to(keep, (length, length))
    if not bidirectional:
        mask = mask & np.tril(np.ones((length, length), bool))
    hidden = model.hidden_states(sequence.embeddings, mx.array(mask)[None, None], None)
    return hidden[:, 1 + whole.total :]


@pytest.mark.parametrize("method", ["norm", "trimvla", "lightvla"])
def test_original_positions_are_those_of_the_unpruned_sequence(tiny_policy, method):
    model, processor = tiny_policy
    observation = look(processor)
    features = control.encode(model, observation)
    ratio = None if method == "lightvla" else 0.25
    patches = control.see(model, observation, Pruner(method, ratio), features)
    sequence = control.assemble(model, observation, patches, "original")
    with model.positions.using(sequence.positions):
        pruned = model.hidden_states(sequence.embeddings, "causal", None)
    masked = hidden_under_a_mask(model, observation, patches, bidirectional=False)
    assert relative(pruned[:, 1 + patches.indices.shape[1] :], masked) < 1e-4


def test_decoding_continues_at_original_positions(tiny_policy):
    """The cached decode equals a forward over everything decoded so far."""
    model, processor = tiny_policy
    observation = look(processor)
    features = control.encode(model, observation)
    patches = control.see(model, observation, Pruner("norm", 0.25), features)
    sequence = control.assemble(model, observation, patches, "original")
    tokens = mx.stack(control.decode(model, sequence, 7), axis=1)
    whole = mx.concatenate([sequence.embeddings, model.embed(tokens)], axis=1)
    positions, _ = control.extended(sequence, 7)
    with model.positions.using(positions):
        hidden = model.hidden_states(whole, "causal", None)
    length = sequence.embeddings.shape[1]
    logits = model.logits(hidden)[:, length - 1 : length + 6]
    assert mx.array_equal(mx.argmax(logits, axis=-1), tokens)
    # 64 visual tokens and <s> come before the prompt's first token.
    first = 1 + patches.indices.shape[1]
    assert positions[0, first].item() == 65


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize(
    "pruner",
    [
        Pruner("norm", 0.5),
        Pruner("trimvla"),
        # Nearly all: compiled shapes are padded to every token.
        Pruner("trimvla", options={"coverage": 0.97, "coverage_temperature": 1}),
        Pruner("lightvla"),
    ],
    ids=str,
)
def test_policy_gives_what_predict_action_gives(tiny_policy, pruner, positions):
    pictures = [load_image(PICTURE), load_image(PICTURE).rotate(90)]
    policy = Policy(*tiny_policy, pruner=pruner, positions=positions, compile=False)
    batch = policy.act_on_batch([[p] for p in pictures], INSTRUCTION)
    for picture, together in zip(pictures, batch, strict=True):
        asked = {"pruner": pruner, "positions": positions}
        alone = predict_action(*tiny_policy, [picture], INSTRUCTION, **asked)
        np.testing.assert_allclose(together, alone.values, atol=1e-12)
        np.testing.assert_allclose(policy([picture], INSTRUCTION), alone.values)


def test_first_layer_s_queries_and_keys(tiny_policy):
    """What trimvla scores with: Q and K of normalised inputs, without rotations."""
    model, _ = tiny_policy
    rng = np.random.default_rng(0)
    visual, text = (rng.normal(size=(1, n, 96)).astype(np.float32) for n in (7, 3))
    queries, keys = model.first_layer(mx.array(visual), mx.array(text))
    attention = model.layers[0].self_attn
    for ours, x, layer in (
        (queries, visual, attention.q_proj),
        (keys, text, attention.k_proj),
    ):
        normal = x[0] / np.sqrt((x[0] ** 2).mean(-1, keepdims=True) + 1e-6)
        projected = normal @ np.array(layer.weight).T
        heads = projected.reshape(len(normal), 4, 24).transpose(1, 0, 2)
        np.testing.assert_allclose(np.array(ours[0]), heads, rtol=1e-4, atol=1e-4)


def test_a_policy_may_tie_its_embeddings(policy_checkpoint):
    file = str(policy_checkpoint / "model.safetensors")
    weights = {k: mx.array(v) for k, v in mx.load(file).items()}
    mx.eval(weights)
    table = weights["language_model.model.embed_tokens.weight"]
    mx.save_safetensors(file, weights | {"language_model.lm_head.weight": table})
    untied = predict_action(*load(policy_checkpoint), [PICTURE], INSTRUCTION)
    del weights["language_model.lm_head.weight"]
    mx.save_safetensors(file, weights)
    tied = predict_action(*load(policy_checkpoint), [PICTURE], INSTRUCTION)
    assert tied.token_ids == untied.token_ids


def test_compiled_policy_gives_the_same_and_keeps_nothing(tiny_policy):
    pruner = Pruner("norm", 0.5)
    pictures = [load_image(PICTURE), load_image(PICTURE).rotate(180)]
    plain = Policy(*tiny_policy, pruner=pruner, compile=False)
    compiled = Policy(*tiny_policy, pruner=pruner)
    first = compiled([pictures[0]], INSTRUCTION)
    np.testing.assert_array_equal(first, plain([pictures[0]], INSTRUCTION))
    compiled([pictures[1]], "open the drawer")
    np.testing.assert_array_equal(first, compiled([pictures[0]], INSTRUCTION))
    compiled.reset()
    np.testing.assert_array_equal(first, compiled([pictures[0]], INSTRUCTION))
