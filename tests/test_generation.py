"""Settings of generation: what mlx-lm and mlx-vlm call them, and what they mean."""

import io
import itertools
import json
import sys
import types

import mlx.core as mx
import numpy as np
import pytest
from asking import IMAGE, answer, scene_of
from conftest import TINY

from mlx_tokprune import Pruner, generate, stream_generate
from mlx_tokprune.errors import InputError
from mlx_tokprune.generate.__main__ import main
from mlx_tokprune.generate.drafts import ModelDrafts, NgramDrafts
from mlx_tokprune.generate.prompt_cache import PromptCache
from mlx_tokprune.generate.settings import Settings
from mlx_tokprune.generate.stream import AnswerText
from mlx_tokprune.pipeline import run
from mlx_tokprune.processing.image import load_image

QUESTION = "What is it?"
ASK = ["--model", str(TINY), "--image", str(IMAGE), "--max-tokens", "6", "--json"]


def by_hand(model, processor, settings: dict, count: int) -> list[int]:
    """Return an answer's tokens; the whole text is read anew for each of them.

    mlx-lm's sampler and processors are called with all ids of prompt and answer.
    """
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    names = ("logit_bias", "repetition", "presence", "frequency")
    of_processors = {k: v for k, v in settings.items() if k.startswith(names)}
    rest = {k: v for k, v in settings.items() if k not in of_processors}
    processors = make_logits_processors(**of_processors)
    tokenizer = processor.tokenizer
    spared = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    sampler, answer_ids = make_sampler(**rest, xtc_special_tokens=spared), []
    scene = scene_of(processor, [load_image(IMAGE)], QUESTION)
    mx.random.seed(3)
    for _ in range(count):
        after = mx.array([answer_ids], mx.int32) if answer_ids else None
        read, _ = run(model, scene, after=after)
        logits = model.decoder.logits(read.hidden)[:, -1]
        ids = [int(i) for part in scene.prompt.segments for i in part]
        for process in processors:
            logits = process(mx.array([*ids, *answer_ids]), logits)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        answer_ids.append(int(sampler(logits).item()))
    return answer_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": 0.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 5.0, "repetition_context_size": 2},
        {"presence_penalty": 2.0, "presence_context_size": 100},
        {"frequency_penalty": 1.5, "frequency_context_size": 50},
        {"logit_bias": {7: 3.0, 40: 100.0}, "repetition_penalty": 90.0},
        {"temp": 1.5, "top_k": 3},
        {"temp": 1.5, "min_p": 0.5, "min_tokens_to_keep": 2},
        {"temp": 2.0, "xtc_probability": 0.9, "xtc_threshold": 0.001},
        {"temp": 1.0, "top_p": 0.5, "top_k": 20, "frequency_penalty": 0.3},
    ],
)
def test_tokens_are_those_of_mlx_lm_s_sampler_and_processors(tiny, settings):
    """Penalties count the text of the prompt and the answer, never visual tokens."""
    expected = by_hand(*tiny, settings, 6)
    found, _ = answer(*tiny, [IMAGE], QUESTION, seed=3, max_tokens=6, **settings)
    assert found == expected[: len(found)]
    assert len(found) == 6 or found[-1] in tiny[1].tokenizer.eos_token_ids


def test_penalties_and_biases_change_the_answer(tiny):
    plain, _ = answer(*tiny, [IMAGE], QUESTION, max_tokens=6)
    for settings in (
        {"repetition_penalty": 0.01},
        {"presence_penalty": -90.0},
        {"frequency_penalty": -90.0},
        {"logit_bias": {plain[0]: -1000.0}},
        {"temp": 5.0, "seed": 1},
    ):
        assert answer(*tiny, [IMAGE], QUESTION, max_tokens=6, **settings)[0] != plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_p": 1.1}, r"min_p 1.1 is out of range; expected one in \[0, 1\]"),
        ({"min_p": float("nan")}, "min_p nan is out"),
        ({"top_k": -1}, "top_k -1 is out of range; expected one from 0"),
        ({"top_k": 2.0}, "top_k is a whole number"),
        ({"top_k": 320}, "below the model's 320 tokens"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep 0"),
        ({"xtc_probability": 2, "temp": 1.0}, "xtc_probability 2"),
        ({"xtc_probability": 0.5}, "expected a temp above 0"),
        ({"xtc_threshold": 0.6}, r"xtc_threshold 0\.6"),
        ({"repetition_penalty": -1}, "repetition_penalty -1"),
        ({"repetition_penalty": "x"}, "repetition_penalty is a number, not 'x'"),
        ({"repetition_context_size": 0}, "repetition_context_size 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf"),
        ({"logit_bias": {320: 1.0}}, "the model has tokens 0 to 319"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias 'a': 1.0"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias 3: nan"),
        ({"stop": ""}, "stop texts"),
        ({"stop": ["a", 3]}, "stop texts"),
        ({"stop": 3}, "stop texts"),
        ({"logit_bias": [3]}, "is no dict by token id"),
        ({"max_kv_size": 4}, "max_kv_size 4 is out of range; expected one from 5"),
        ({"max_kv_size": 100, "kv_bits": 8}, "leave out one"),
        ({"system_prompt": "<image>"}, "the system prompt cannot hold <image>"),
        ({"system_prompt": 3}, "the system prompt is a text"),
        ({"system_prompt": "x" * 10**6}, "the system prompt is too long"),
    ],
)
def test_settings_out_of_range(tiny, settings, message):
    with pytest.raises(InputError, match=message):
        stream_generate(*tiny, [IMAGE], "Hi", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.1},
        {"logit_bias": {3: 1.0}},
        {"temp": 1.0, "top_k": 5},
        {"temp": 1.0, "min_p": 0.1},
        {"max_kv_size": 500},
    ],
)
def test_drafts_refuse_what_they_cannot_follow(tiny, settings):
    for draft in (NgramDrafts(), ModelDrafts(*tiny)):
        with pytest.raises(InputError, match="a draft samples by temp and top_p alone"):
            stream_generate(*tiny, [IMAGE], "Hi", draft=draft, **settings)
    assert Settings(top_k=5, min_p=0.5, repetition_penalty=0).only_temp_and_top_p


# Stop texts -------------------------------------------------------------------------


class Words:
    """A tokenizer whose tokens are texts; the last ends an answer."""

    def __init__(self, texts):
        self.texts, self.eos_token_ids = texts, {len(texts)}
        self.detokenizer, self.last_segment = self, ""

    def reset(self):
        self.last_segment = ""

    def add_token(self, token):
        self.last_segment = self.texts[token]

    def finalize(self):
        pass


def test_a_stop_text_is_cut_wherever_tokens_end():
    """Random texts in random pieces: compared to a search in the whole text."""
    rng = np.random.default_rng(0)
    for _ in range(400):
        whole = "".join(rng.choice(list("ab"), rng.integers(1, 14)))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 4))) for _ in range(2)]
        cuts = sorted(rng.integers(0, len(whole), 3))
        edges = [0, *cuts, len(whole)]
        pieces = [whole[i:j] for i, j in itertools.pairwise(edges)]
        text, shown, reason = AnswerText(Words(pieces), stops), "", None
        for token in range(len(pieces)):
            piece, reason = text.add(token, token == len(pieces) - 1)
            shown += piece
            # Nothing shown may be the beginning of a stop text that then completes.
            assert whole.startswith(shown)
            if reason:
                break
        ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
        if not ends:
            assert (shown, reason) == (whole, "length")
            continue
        end = min(ends)
        starts = [end - len(stop) for stop in stops if whole[:end].endswith(stop)]
        assert shown in [whole[:start] for start in starts]
        assert reason == "stop"


def test_stop_texts_of_a_model(demo):
    model, processor = demo
    from mlx_tokprune.checkpoints.embedded import PICTURES

    asked = (model, processor, [PICTURES[0].path], PICTURES[0].question)
    assert generate(*asked) == "EAST"
    for stop, expected in (
        ("S", "EA"),
        (["T", "AS"], "E"),
        ("EAST", ""),
        ("x", "EAST"),
    ):
        pieces = list(stream_generate(*asked, stop=stop))
        assert "".join(piece.text for piece in pieces) == expected
        assert pieces[-1].finish_reason == "stop"
    drafted = generate(*asked, stop="S", draft=NgramDrafts())
    assert drafted == "EA"


# System prompt, cache size ----------------------------------------------------------


def test_the_system_prompt_stands_in_the_template(tiny):
    _, processor = tiny
    own = processor.with_system("Be brief.")
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert own.prefix == start
    assert own.with_system("").with_system("Be brief.") == own
    same = processor.with_system("You are a helpful assistant.")
    assert same.prefix == processor.prefix
    plain = answer(*tiny, [IMAGE], QUESTION, max_tokens=6)[0]
    text = "You are a helpful assistant."
    options = {"max_tokens": 6, "system_prompt": text}
    assert answer(*tiny, [IMAGE], QUESTION, **options)[0] == plain
    other = answer(tiny[0], own, [IMAGE], QUESTION, max_tokens=6)[0]
    options["system_prompt"] = "Be brief."
    assert answer(*tiny, [IMAGE], QUESTION, **options)[0] == other


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_the_cache_keeps_at_most_so_many_tokens(tiny, positions, monkeypatch):
    """Answers agree until the cache is full; then the oldest tokens are replaced."""
    from mlx_lm.models import cache as caches

    sizes = []
    fetch = caches.RotatingKVCache.update_and_fetch

    def watched(self, *arrays):
        keys, values = fetch(self, *arrays)
        sizes.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(caches.RotatingKVCache, "update_and_fetch", watched)
    _, processor = tiny
    prompt = sum(map(len, processor.prompt(QUESTION, 1).segments)) + 8
    options = {"pruner": Pruner("norm", keep_tokens=8), "positions": positions}
    options["max_tokens"] = 20
    whole, _ = answer(*tiny, [IMAGE], QUESTION, **options)
    room = answer(*tiny, [IMAGE], QUESTION, max_kv_size=prompt + 30, **options)[0]
    assert room == whole
    small = answer(*tiny, [IMAGE], QUESTION, max_kv_size=prompt + 5, **options)[0]
    assert small[:6] == whole[:6]
    assert max(sizes) <= prompt + 30
    del sizes[:]
    answer(*tiny, [IMAGE], QUESTION, max_kv_size=prompt, **options)
    assert max(sizes) == prompt
    with pytest.raises(InputError, match=f"has {prompt} tokens, but max_kv_size is"):
        answer(*tiny, [IMAGE], QUESTION, max_kv_size=prompt - 1, **options)


# Prompt cache files -----------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize(
    "pruner",
    [None, Pruner("norm", 0.5), Pruner("prumerge", 0.25), Pruner("visionzip", 0.3)],
)
def test_a_prompt_cache_file_gives_the_same_tokens(demo, tmp_path, pruner, positions):
    from mlx_lm.models.cache import load_prompt_cache

    path = tmp_path / "cache.safetensors"
    options = {"pruner": pruner, "positions": positions, "max_tokens": 5}
    expected = [answer(*demo, [IMAGE], q, **options)[0] for q in ("A?", QUESTION)]
    found = [
        answer(*demo, [IMAGE], q, memory=PromptCache(path), **options)
        for q in ("A?", QUESTION)
    ]
    assert [ids for ids, _ in found] == expected
    assert found[0][1] == 0
    assert found[1][1] > 0
    layers = len(demo[0].layers)
    assert len(load_prompt_cache(str(path))) == layers + 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_prompt_cache_file_is_bound_to_what_it_was_made_with(demo, tiny, tmp_path):
    path = tmp_path / "cache.safetensors"
    model, processor = demo
    pruner = Pruner("norm", 0.5)
    asked = ([IMAGE], QUESTION)

    def run_with(m=model, p=processor, asked=asked, **options):
        options = {"pruner": pruner, "max_tokens": 2} | options
        return answer(m, p, *asked, memory=PromptCache(path), **options)

    run_with()
    before = path.read_bytes()
    other = TINY / "image_1.png"
    for message, options in (
        ("another pruner", {"pruner": Pruner("norm", 0.25)}),
        ("another pruner", {"pruner": Pruner("attention", 0.5)}),
        ("another pruner", {"pruner": None}),
        ("another positions setting", {"positions": "contiguous"}),
        ("another picture", {"asked": ([other], QUESTION)}),
        ("another picture", {"asked": ([IMAGE, IMAGE], QUESTION)}),
        ("another text before the picture", {"system_prompt": "Hm."}),
        ("another text before the picture", {"asked": ([IMAGE], "In <image> what?")}),
        ("another image size", {"p": processor.at(256)}),
        ("another image size", {"p": processor.at(512, "skip")}),
        ("another model", {"m": tiny[0], "p": tiny[1]}),
        ("at the tower", {"pruner": Pruner("norm", 0.5, at="prompt")}),
        ("at the tower", {"pruner": [pruner, Pruner("fastv", 0.5)]}),
    ):
        with pytest.raises(InputError, match=message):
            run_with(**options)
        assert path.read_bytes() == before
    assert run_with()[1] > 0


def test_a_damaged_prompt_cache_file_is_refused(demo, tmp_path):
    from mlx_lm.models.cache import save_prompt_cache

    path = tmp_path / "cache.safetensors"
    asked, options = (*demo, [IMAGE], QUESTION), {"max_tokens": 2}
    answer(*asked, memory=PromptCache(path), **options)
    whole = path.read_bytes()
    save_prompt_cache(str(tmp_path / "mlx.safetensors"), demo[0].decoder.make_cache())
    foreign = (tmp_path / "mlx.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:-1], whole[:100], b"", b"x" * 100, whole + b"x", foreign]
    for place in rng.integers(8, len(whole), 30):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(0, 8)
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(InputError):
            answer(*asked, memory=PromptCache(path), **options)
        assert path.read_bytes() == data
    for name in ("cache", "cache.npz", "nowhere/c.safetensors"):
        with pytest.raises(InputError):
            PromptCache(tmp_path / name)


# Command line -----------------------------------------------------------------------


def ids_of(capsys, *options: str) -> list[int]:
    main([*ASK, *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"]


def test_flags_reach_the_settings(capsys, tiny):
    ask = ["--prompt", QUESTION]
    plain = ids_of(capsys, *ask)
    for flags, options in (
        (["--system-prompt", "Hm."], {"system_prompt": "Hm."}),
        (["--system", "Hm."], {"system_prompt": "Hm."}),
        (["--repetition-penalty", "9"], {"repetition_penalty": 9.0}),
        (["--logit-bias", "65=50", "--logit-bias", "66=-9"], {"logit_bias": {65: 50}}),
        (["--temperature", "2", "--top-k", "4"], {"temp": 2.0, "top_k": 4, "seed": 0}),
        (["--temp=2", "--min-p=.3"], {"temp": 2.0, "min_p": 0.3, "seed": 0}),
        (["--max-kv-size", "500"], {"max_kv_size": 500}),
    ):
        expected = answer(*tiny, [IMAGE], QUESTION, max_tokens=6, **options)[0]
        assert ids_of(capsys, *ask, *flags) == expected
    assert ids_of(capsys, "-p", QUESTION) == plain


def test_several_images_after_one_flag(capsys):
    two = ["--image", str(IMAGE), str(TINY / "image_1.png"), "--prompt", QUESTION]
    main([*ASK[:2], *two, *ASK[4:]])
    apart = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(apart["kept_indices"]) == 2
    main([*ASK, "--image", str(TINY / "image_1.png"), "--prompt", QUESTION])
    assert (
        json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"]
        == (apart["token_ids"])
    )


def test_a_prompt_or_a_picture_from_standard_input(capsys, monkeypatch):
    def pipe(data: bytes):
        text = io.TextIOWrapper(io.BytesIO(data))
        monkeypatch.setattr(sys, "stdin", text)

    plain = ids_of(capsys, "--prompt", QUESTION)
    pipe(QUESTION.encode() + b"\n")
    assert ids_of(capsys, "--prompt", "-") == plain
    pipe(IMAGE.read_bytes())
    main([*ASK[:2], "--image", "-", "--prompt", QUESTION, *ASK[4:]])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["token_ids"] == plain


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "-", "--image", "-"], "standard input was named twice"),
        (["--prompt", "-", "--prompt", "-"], "standard input was named twice"),
        (["--prompt", "a", "--logit-bias", "x=3"], "--logit-bias is ID=BIAS"),
        (["--prompt", "a", "--logit-bias", "3"], "--logit-bias is ID=BIAS"),
        (["--prompt", "a", "--top-k", "x"], "invalid int value"),
        (["--prompt", "a", "--stop", ""], "stop texts"),
        (["--prompt", "a", "--prompt-cache-file", "a.npz"], "NAME.safetensors"),
        (
            ["--prompt", "a", "--prompt-cache-file", "a.safetensors", "--temporal"],
            "leave out --temporal",
        ),
    ],
)
def test_bad_flags_are_one_sentence(capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(read=lambda: "Hi"))
    with pytest.raises(SystemExit) as stop:
        main([*ASK, *flags])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
