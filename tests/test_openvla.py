"""OpenVLA equals the float32 values of the reference implementation."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY_POLICY

from mlx_tokprune import Policy, Pruner, load, pipeline
from mlx_tokprune.act.__main__ import main
from mlx_tokprune.act.heads import head_of
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.act.predict import predict_action
from mlx_tokprune.convert import convert
from mlx_tokprune.models.language import TokenSequence
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import as_plan

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


def scene_of(processor) -> pipeline.Scene:
    return observe(processor, [[load_image(PICTURE)]], processor.prompt(INSTRUCTION))


def see(model, scene, *pruners) -> tuple[pipeline.VisualTokens, TokenSequence]:
    """Return the kept visual tokens, and the sequence at original positions."""
    plan = as_plan(pruners)
    visual = pipeline.look(model, scene, plan)
    visual = pipeline.prune_at_prompt(model, scene, plan, visual)
    return visual, pipeline.assemble(model, scene, visual, plan)


def states(model, sequence: TokenSequence) -> mx.array:
    """Return (B, T, D) states of all tokens."""
    rows = sequence.embeddings.shape[1]
    return model.decoder.read(sequence, rows=rows).hidden


def test_pixels_and_prompt_equal_the_reference(tiny_policy, expected):
    model, processor = tiny_policy
    scene = scene_of(processor)
    towers = zip(model.args.means, model.args.stds, strict=True)
    both = [(scene.pixels - mx.array(m)) / mx.array(s) for m, s in towers]
    ours = mx.concatenate(both, axis=-1)[:, ::8, ::8].transpose(0, 3, 1, 2)
    assert mx.array_equal(ours, expected["pixel_values"])
    (start,), prompt = scene.prompt.segments
    assert [start, *prompt] == expected["input_ids"].tolist()


def test_towers_and_projector_equal_the_reference(tiny_policy, expected):
    model, processor = tiny_policy
    features = pipeline.encode(model, scene_of(processor), ())
    assert not features.extras
    assert relative(features.tokens[..., :48], expected["dinov2_features"]) < 1e-4
    assert relative(features.tokens[..., 48:], expected["siglip_features"]) < 1e-4
    assert relative(model.project(features.tokens), expected["projected"]) < 1e-4


@pytest.mark.parametrize(("method", "budget"), CASES)
def test_logits_equal_the_reference(tiny_policy, expected, method, budget):
    model, processor = tiny_policy
    name = f"{method}_{budget}_" if budget else ""
    scene = scene_of(processor)
    plan = as_plan(Pruner(method, int(budget) / 100 if budget else None))
    how = {"positions": "contiguous", "rows": 8}
    read, visual = pipeline.run(model, scene, plan, **how)
    logits = model.decoder.logits(read.hidden)[0]
    assert relative(logits, expected[f"{name}logits"]) < 1e-4
    # mlx-lm's way through the same layers.
    sequence = pipeline.assemble(model, scene, visual, plan, "contiguous")
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
            *("--positions", "contiguous"),
        ]
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["token_ids"] == expected[f"{name}greedy_ids"].tolist()
    np.testing.assert_allclose(record["action"], expected[f"{name}action"], atol=1e-5)
    if budget:
        assert record["kept_indices"][0] == expected[f"{name}indices"].tolist()


def test_attention_of_the_class_token_is_what_the_block_computes(tiny_policy):
    model, processor = tiny_policy
    scene = scene_of(processor)
    received = model.encode(scene.pixels, ("attention",)).extras["attention"]
    tower = model.vision_backbone.featurizer
    mean, std = (mx.array(x[0]) for x in (model.args.means, model.args.stds))
    x = tower._embed((scene.pixels - mean) / std)
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
    np.testing.assert_allclose(np.array(received)[0], total, rtol=1e-4)


def hidden_under_a_mask(model, scene, visual) -> mx.array:
    """Return states of the full sequence with the dropped tokens masked."""
    whole, sequence = see(model, scene)
    length = sequence.embeddings.shape[1]
    keep = np.zeros(length, bool)
    keep[0] = keep[1 + whole.total :] = True
    keep[1 + np.array(visual.indices[0])] = True
    mask = np.broadcast_to(keep, (length, length)) & np.tri(length, dtype=bool)
    masked = dataclasses.replace(sequence, mask=mx.array(mask)[None])
    return states(model, masked)[:, 1 + whole.total :]


@pytest.mark.parametrize("method", ["norm", "trimvla", "lightvla"])
def test_original_positions_are_those_of_the_unpruned_sequence(tiny_policy, method):
    model, processor = tiny_policy
    scene = scene_of(processor)
    ratio = None if method == "lightvla" else 0.25
    visual, sequence = see(model, scene, Pruner(method, ratio))
    assert visual.keep < visual.total
    pruned = states(model, sequence)[:, 1 + visual.keep :]
    assert relative(pruned, hidden_under_a_mask(model, scene, visual)) < 1e-4


def test_decoding_continues_at_original_positions(tiny_policy):
    """The cached decode equals a forward over everything decoded so far."""
    model, processor = tiny_policy
    scene, pruner = scene_of(processor), Pruner("norm", 0.25)
    head = head_of(model, processor, 7)
    tokens = head.joined(head.decode(model, scene, (pruner,))[0])
    visual, sequence = see(model, scene, pruner)
    whole = sequence.extended(model.decoder.embed(tokens))
    logits = model.decoder.logits(states(model, whole))
    length = sequence.embeddings.shape[1]
    greedy = mx.argmax(logits[:, length - 1 : length + 6], axis=-1)
    assert mx.array_equal(greedy, tokens)
    # 64 visual tokens and <s> come before the prompt's first token.
    assert whole.positions[1 + visual.keep].item() == 65
    end = 1 + visual.total + len(scene.prompt.segments[1])
    assert whole.positions[length:].tolist() == list(range(end, end + 7))


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize(
    "pruner",
    [
        Pruner("norm", 0.5),
        Pruner("trimvla"),
        # Nearly all: compiled shapes are padded to every token.
        Pruner("trimvla", options={"coverage": 0.97, "coverage_temperature": 1}),
        Pruner("lightvla"),
        Pruner("attention", 0.5, at=1),
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
    """TrimVLA's queries and keys are normalised and unrotated."""
    model, _ = tiny_policy
    rng = np.random.default_rng(0)
    visual, text = (rng.normal(size=(1, n, 96)).astype(np.float32) for n in (7, 3))
    prepare = Pruner("trimvla").prepare
    queries, keys = model.decoder.queries_and_keys(
        prepare(mx.array(visual)), prepare(mx.array(text))
    )
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
