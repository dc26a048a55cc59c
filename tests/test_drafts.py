"""Drafts of answers: equal tokens or equal distributions, in fewer calls."""

import importlib
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY

from mlx_tokprune import InputError, Memory, Policy, Pruner, stream_generate
from mlx_tokprune.act.__main__ import main as act
from mlx_tokprune.bench import speed_table as table
from mlx_tokprune.bench.__main__ import main as bench
from mlx_tokprune.checkpoints.embedded import POLICY_FRAME
from mlx_tokprune.generate.__main__ import main
from mlx_tokprune.generate.drafts import (
    ModelDrafts,
    NgramDrafts,
    PrefillResult,
    SelfDrafts,
)
from mlx_tokprune.generate.settings import Settings
from mlx_tokprune.models.positions import LayerCache
from mlx_tokprune.models.speculative import Draft, ModelDrafter, NgramDrafter, Sampling
from mlx_tokprune.pipeline import Scene, prune_at_prompt, run
from mlx_tokprune.processing.image import load_image

PICTURE = TINY / "image_0.png"
LENGTH = 25
PLANS = {
    "none": (),
    "norm": (Pruner("norm", 0.5),),
    "prompt": (Pruner("norm", 0.5, at="prompt"),),
    "layers": (Pruner("norm", 0.5), Pruner("attention", 0.5, at=1)),
}


def answer(loaded, draft=None, pruner=(), images=None, **how):
    """Return the token ids, and the number of model calls."""
    how = {"max_tokens": LENGTH, **how}
    asked = (*loaded, images or [PICTURE], "What is this?")
    pieces = list(stream_generate(*asked, pruner=pruner, draft=draft, **how))
    return [piece.token for piece in pieces], pieces[-1].calls


def drafts(loaded) -> dict:
    return {
        "ngram": NgramDrafts(),
        "self": SelfDrafts(),
        "itself": ModelDrafts(*loaded),
        "pruned": ModelDrafts(*loaded, pruner=Pruner("random", 0.1), tokens=5),
    }


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["ngram", "self", "itself", "pruned"])
def test_greedy_answers_are_the_same(tiny, name, plan):
    draft = drafts(tiny)[name]
    if name == "self" and plan not in ("none", "norm"):
        with pytest.raises(InputError, match="under pruning at the tower"):
            answer(tiny, draft, PLANS[plan])
        return
    for how in ({}, {"positions": "contiguous"}, {"prefill_step_size": 4}):
        expected, calls = answer(tiny, None, PLANS[plan], **how)
        assert len(expected) == calls == LENGTH
        found, calls = answer(tiny, draft, PLANS[plan], **how)
        assert found == expected
        assert calls <= LENGTH


def test_a_model_that_drafts_for_itself_is_always_right(tiny):
    expected, _ = answer(tiny)
    for draft in (ModelDrafts(*tiny), SelfDrafts(Pruner("norm", 1.0, at="prompt"))):
        for temp in (0.0, 1.0):
            _, calls = answer(tiny, draft, temp=temp, seed=0)
            assert calls == 1 + (LENGTH - 1) / 4
    assert answer(tiny, ModelDrafts(*tiny, tokens=LENGTH))[1] == 2
    assert answer(tiny, ModelDrafts(*tiny), max_tokens=3)[0] == expected[:3]
    assert answer(tiny, ModelDrafts(*tiny), max_tokens=1) == (expected[:1], 1)


def held(drafter: ModelDrafter) -> int:
    """Return the number of tokens in a drafter's cache."""
    return drafter._cache[0].inner.offset


def test_a_model_drafts_as_if_it_did_not_see_what_is_left_out(tiny):
    """Drafting with pruned tokens equals masking them behind the prompt."""
    model, processor = tiny
    images = [load_image(PICTURE), load_image(PICTURE).rotate(90)]
    prompt = processor.prompt("<image>What<image>is this?", 2)
    scene = Scene(mx.array(processor.pixels(images)), prompt)
    cache = model.decoder.make_cache()
    plan = (Pruner("norm", 0.5),)
    read, visual = run(model, scene, plan, cache=cache)
    begun = PrefillResult(model, images, prompt, read, visual, Settings(temp=1.0))
    less = Pruner("norm", 0.25, at="prompt")
    draft = SelfDrafts(less).begin(begun)([7], 4)
    pruned = ModelDrafts(*tiny, pruner=Pruner("norm", 3 / 64)).begin(begun)
    text = sum(map(len, prompt.segments))
    assert held(pruned) == text + 2 * 3
    assert held(ModelDrafts(*tiny).begin(begun)) == text + 2 * 64
    kept = np.array(prune_at_prompt(model, scene, (less,), visual).indices)
    seen = []
    for number, text in enumerate(prompt.segments):
        seen += [True] * len(text)
        if number < 2:
            seen += np.isin(np.array(visual.indices)[number], kept[number]).tolist()
    assert 0 < seen.count(False) < len(seen)
    mask = mx.array([seen])
    parts = [LayerCache(part.inner, part.shift, None, mask) for part in read.cache]
    for number, token in enumerate([7, *draft.tokens[:-1]]):
        hidden = model.decoder.follow(mx.array([[token]]), parts)
        expected = Sampling(1.0).log_shares(model.decoder.logits(hidden)[0, 0])
        np.testing.assert_allclose(draft.log_shares[number], expected, atol=1e-4)


def test_answers_about_several_pictures_and_remembered_ones(tiny):
    images = [TINY / "image_0.png", load_image(TINY / "image_0.png").rotate(90)]
    expected, _ = answer(tiny, images=images)
    memory = Memory()
    for _ in range(2):
        for draft in drafts(tiny).values():
            assert answer(tiny, draft, images=images, memory=memory)[0] == expected


def test_a_quantized_cache(demo, monkeypatch):
    monkeypatch.setattr(demo[1].tokenizer, "_eos_token_ids", set())  # it says one word
    how = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    expected, _ = answer(demo, **how)
    assert len(expected) == LENGTH
    for draft in drafts(demo).values():
        found, calls = answer(demo, draft, **how)
        assert found == expected
        assert calls < LENGTH


def test_a_cache_is_quantized_once_it_is_long_enough(tiny, monkeypatch):
    module = importlib.import_module("mlx_lm.generate")
    lengths = []
    monkeypatch.setattr(
        module,
        "maybe_quantize_kv_cache",
        lambda cache, **how: lengths.append(cache[0].inner.offset),
    )
    _, calls = answer(tiny, NgramDrafts())
    assert len(lengths) == calls  # before the first and after each that decodes
    assert lengths == sorted(lengths)
    assert lengths[-1] >= lengths[0] + LENGTH - 1


# Chance -----------------------------------------------------------------------------


def shares(logs) -> np.ndarray:
    return np.exp(np.array(logs, np.float64))


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 0.8)])
@pytest.mark.parametrize("guess", [False, True])
def test_sampled_tokens_have_the_chances_of_the_model(sampling, guess):
    mx.random.seed(1)
    logits = mx.random.normal((3, 6)) * 1.5
    drafted = sampling.log_shares(mx.random.normal((2, 5)) * 1.5)
    likely = np.array(mx.argmax(logits, axis=1)).tolist()[:2]
    seen, firsts, runs = np.zeros((6, 6)), np.zeros(6), 1500
    for _ in range(runs):
        tokens = np.array(mx.random.categorical(drafted)).tolist()
        tokens = likely if guess else tokens
        draft = Draft(tokens, None if guess else drafted)
        found = sampling.accepted(draft, logits)
        assert 1 <= len(found) <= 3
        firsts[found[0]] += 1
        if len(found) > 1:
            seen[found[0], found[1]] += 1
    expected = shares(sampling.log_shares(logits))
    error = 5 * (0.25 / runs) ** 0.5  # five standard deviations, at the most
    np.testing.assert_allclose(firsts / runs, expected[0], atol=error)
    # Whatever came first, the second is as the model has it after what was drafted.
    count = seen.sum()
    assert count > runs / 20
    error = 5 * (0.25 / count) ** 0.5
    np.testing.assert_allclose(seen.sum(axis=0) / count, expected[1], atol=error)
    assert not firsts[expected[0] == 0].any()


def test_chances_are_those_of_mlx_lm():
    from mlx_lm.sample_utils import make_sampler

    logits = mx.array([[1.0, 0.8, 0.6, 0.4, 0.2]])
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = shares(Sampling(0.6, 0.5).log_shares(logits))[0]
    assert (own > 0).sum() == 2
    mx.random.seed(0)
    many = mx.broadcast_to(logs, (20_000, 5))
    found = np.bincount(np.array(make_sampler(0.6, 0.5)(many)), minlength=5) / 20_000
    np.testing.assert_allclose(found, own, atol=5 * (0.25 / 20_000) ** 0.5)


def test_a_draft_knows_fewer_or_more_tokens(tiny):
    model = tiny[0]
    decoder, cache = model.decoder, model.decoder.make_cache()
    parts = [LayerCache(part) for part in cache]
    drafter = ModelDrafter(decoder, parts, Sampling(1.0), vocabulary=7)
    draft = drafter([1], 4)
    assert max(draft.tokens) < 7
    assert draft.log_shares.shape == (4, 7)
    assert drafter([1, *draft.tokens[:2], 9], 0) == Draft([])
    assert parts[0].inner.offset == 3  # what was wrong is forgotten
    logits = mx.zeros((5, 12))
    assert len(Sampling(1.0).accepted(draft, logits)) <= 5


def test_ngrams_come_from_the_prompt_and_the_answer():
    repeating = NgramDrafter([1, 2, 3, 4, 5])
    assert repeating([9, 2, 3], 8).tokens == [4, 5, 9, 2, 3]
    assert repeating([7, 8, 7], 8).tokens == [8, 7]
    assert repeating([2, 3], 1).tokens == [4]
    assert repeating([6], 8).tokens == []
    # Of two places the later one.
    assert NgramDrafter([1, 2, 5, 1, 2, 6])([1, 2], 1).tokens == [6]


def test_damaged_logits_are_no_tokens():
    logits = mx.full((2, 4), mx.nan)
    assert Sampling().accepted(Draft([2]), logits) == [-1]


# What is refused ----------------------------------------------------------------------


def test_what_cannot_draft_is_refused(tiny, demo, demo_policy):
    with pytest.raises(InputError, match="tokenizer has other tokens"):
        answer(tiny, ModelDrafts(*demo))
    with pytest.raises(InputError, match="answers in actions"):
        ModelDrafts(*demo_policy)
    for wrong in (0, -1, 1.5):
        with pytest.raises(InputError, match="the least is 1"):
            NgramDrafts(tokens=wrong)
    for pruner in (Pruner("norm", 0.5), Pruner("lightvla")):
        with pytest.raises(InputError, match="are pruned at the prompt, with a budget"):
            SelfDrafts(pruner)


def test_command_line(capsys):
    asked = ["--model", str(TINY), "--image", str(PICTURE), "--prompt", "What is this?"]
    asked += ["--max-tokens", "9", "--json"]
    found = []
    for more in (
        [],
        ["--draft", "ngram"],
        ["--draft", "self", "--draft-prune", "norm:0.5@prompt"],
        ["--draft-model", str(TINY), "--draft-prune", "norm:0.9"],
        ["--draft-model", str(TINY), "--num-draft-tokens", "8"],
    ):
        main([*asked, *more])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert len({tuple(record["token_ids"]) for record in found}) == 1
    assert (found[0]["calls"], found[-1]["calls"]) == (9, 2)
    for more, said in (
        (["--draft", "ngram", "--draft-model", "demo"], "give one of them"),
        (["--draft-prune", "norm:0.5"], "give --draft-model, too"),
        (["--num-draft-tokens", "2"], "requires --draft or --draft-model"),
        (["--draft", "self", "--draft-prune", "norm:0.5"], "pruned at the prompt"),
        (["--draft-model", "demo"], "tokenizer has other tokens"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*asked, *more])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


# Policies -----------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_policy_drafts_for_another(demo_policy, compiled):
    frame = load_image(POLICY_FRAME.path)
    how = {"pruner": Pruner("trimvla", 0.5), "compile": compiled}
    plain = Policy(*demo_policy, **how)
    for pruner, most in ((Pruner("trimvla", 0.5), 1), (Pruner("random", 0.1), 4)):
        other = Policy(*demo_policy, pruner=pruner, compile=compiled)
        policy = Policy(*demo_policy, draft=other, **how)
        for seen in (frame, frame.rotate(5), frame.rotate(170)):
            expected = plain([seen], "open the drawer")
            found = policy([seen], "open the drawer")
            np.testing.assert_array_equal(found, expected)
            assert 1 <= policy.calls <= most
        batch = [[frame], [frame.rotate(20)]]
        expected = plain.act_on_batch(batch, "open the drawer")
        found = policy.act_on_batch(batch, "open the drawer")
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("draft", ["ngram", "policy"])
def test_chunks_are_drafted(tiny_chunks, draft):
    model, _ = tiny_chunks
    other = Policy(*tiny_chunks, pruner=Pruner("norm", 0.5))
    plain = Policy(*tiny_chunks)
    policy = Policy(*tiny_chunks, draft=other if draft == "policy" else draft)
    picture = load_image(PICTURE)
    for number in range(4):
        images = {"base": picture.rotate(20 * (number // 2))}
        asked = (images, "Pick up the cup", [0.0] * model.args.state_size)
        np.testing.assert_array_equal(policy(*asked), plain(*asked))
        assert 1 + (draft == "ngram") <= policy.calls <= plain.calls
    same = Policy(*tiny_chunks, draft=Policy(*tiny_chunks))
    same(*asked)
    assert same.calls == 1


def test_policies_that_cannot_draft_are_refused(demo_policy, tiny_policy, tiny_chunks):
    with pytest.raises(InputError, match="expected one of the same family and robot"):
        Policy(*demo_policy, draft=Policy(*tiny_policy))
    with pytest.raises(InputError, match="expected one of the same family and robot"):
        Policy(*demo_policy, draft=Policy(*tiny_chunks))
    with pytest.raises(InputError, match="or a Policy, not 'model'"):
        Policy(*demo_policy, draft="model")
    with pytest.raises(InputError, match="only the answers of pi0-FAST"):
        Policy(*demo_policy, draft="ngram")


def test_a_policy_drafts_on_the_command_line(capsys):
    asked = ["--model", str(TINY_POLICY), "--image", str(TINY_POLICY / "image_0.png")]
    asked += ["--instruction", "pick up the cup", "--json", "--runs", "1"]
    found = []
    for more in ([], ["--draft-model", str(TINY_POLICY)]):
        act([*asked, *more])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["action"] == found[1]["action"]
    assert (found[0]["calls"], found[1]["calls"]) == (7, 1)


# Measured -----------------------------------------------------------------------------


def test_the_benchmark_has_a_row_for_each_draft(tmp_path, capsys):
    output = tmp_path / "bench.json"
    asked = ["--model", str(TINY), "--methods", "norm", "--keep-ratios", "0.5"]
    asked += ["--tokens", "9", "--runs", "2", "--output", str(output)]
    asked += ["--draft-model", str(TINY), "--num-draft-tokens", "8"]
    bench([*asked, "--draft-prune", "none"])
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    name = f"{TINY.name}+none"
    assert [row.get("draft") for row in rows] == [None, name] * (len(rows) // 2)
    for row in rows:
        samples = row["samples"]
        assert samples["tokens"] == [9, 9]
        plain = row["method"] == "none" and row["image_size"] == 512
        assert row.get("draft") or samples["calls"] == [9, 9]
        assert not (plain and row.get("draft")) or samples["calls"] == [2, 2]
    shown = f"| 512 | none, draft {name} |"
    line = next(row for row in printed.splitlines() if shown in row)
    assert [cell.strip() for cell in line.split("|")[18:20]] == ["2", "8.00"]


def test_a_drafted_row_is_no_base():
    case = dict.fromkeys(("model", "image_size", "prompt", "positions"))
    plain = {**case, "method": "none"}
    rows = [{**plain, "draft": "self"}, plain]
    assert table.unpruned({**case, "method": "norm"}, rows) is plain


def test_drafts_are_refused_where_there_are_none(tmp_path, capsys):
    output = ["--output", str(tmp_path / "bench.json")]
    asked = ["--model", str(TINY_POLICY), "--draft", "ngram", *output]
    for more, said in (
        (asked, "measures them in closed loop"),
        (["--runtime", "mlx-vlm", "--draft", "ngram", *output], "own runtime"),
        (["--model", str(TINY), "--draft-model", "demo", *output], "other tokens"),
    ):
        with pytest.raises(SystemExit) as stopped:
            bench(more)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()
