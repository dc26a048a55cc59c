"""`attach` in mlx-vlm's own generate, chats, batches: what holds for each family."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.generate import PromptCacheState  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402
from vlm.families import FAMILIES, picture, prompt  # noqa: E402

from mlx_tokprune import InputError, Pruner  # noqa: E402
from mlx_tokprune.adapters import mlx_vlm as adapter  # noqa: E402
from mlx_tokprune.adapters.mlx_vlm import attach  # noqa: E402

QUESTION, MORE = "what is in the picture ?", "which colour is it ?"
LENGTH = 8
PRUNED = [name for name in FAMILIES if name != "llava_next"]
# A state that has read a token cannot be told to have not.
RECURRENT = {"qwen3_5"}
HALF = Pruner("norm", 0.5)


@pytest.fixture(scope="module", autouse=True)
def _not_compiled():
    """MLX would call a C++ compiler for every family."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Loaded:
    """A tiny checkpoint in mlx-vlm, and pictures for it."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        family.write(folder)
        self.files = [str(folder / f"{seed}.png") for seed in range(3)]
        for seed, file in enumerate(self.files):
            picture(family, seed).save(file)
        self.model, self.processor = mlx_vlm.load(str(folder))

    def ask(self, text=None, file=None, **named):
        """The ids of a greedy answer, and how many a prompt had."""
        text = text or prompt(self.processor, self.model.config, QUESTION)
        named = {"max_tokens": LENGTH, "temperature": 0.0, **named}
        file = file or self.files[0]
        pieces = mlx_vlm.stream_generate(
            self.model, self.processor, text, image=[file], **named
        )
        last = list(pieces)[-1]
        return last.token_ids, last.prompt_tokens

    def chat(self, *answers: str) -> str:
        """A conversation with the picture in its first turn."""
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        turns = [{"role": "user", "content": content}]
        for answer in answers:
            turns.append({"role": "assistant", "content": answer})
            turns.append({"role": "user", "content": MORE})
        return apply_chat_template(
            self.processor, self.model.config, turns, num_images=1
        )

    @contextlib.contextmanager
    def pruned(self, pruner=HALF, positions=None):
        handle = attach(self.model, self.processor, pruner, positions)
        try:
            yield handle
        finally:
            handle.detach()

    @property
    def original(self) -> str | None:
        """What makes positions original."""
        return None if self.family.mrope else "original"


@pytest.fixture(scope="module", params=PRUNED)
def loaded(request, tmp_path_factory):
    return Loaded(FAMILIES[request.param], tmp_path_factory.mktemp(request.param) / "m")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Loaded(FAMILIES["qwen2_vl"], tmp_path_factory.mktemp("one") / "m")


@contextlib.contextmanager
def masked(model, columns):
    """Nobody in the language model sees these columns."""
    attention, kind = mx.fast.scaled_dot_product_attention, type(model)
    embed, seen = kind.get_input_embeddings, []

    def unseen(queries, keys, values, *, scale, mask=None, **named):
        length, total = queries.shape[-2], keys.shape[-2]
        if not seen:
            return attention(queries, keys, values, scale=scale, mask=mask, **named)
        allowed = mx.ones((length, total), mx.bool_)
        if isinstance(mask, str):
            allowed = mx.tri(length, total, total - length, mx.bool_)
        gone = np.isin(np.arange(total), columns)
        bias = mx.where(allowed & ~mx.array(gone), 0.0, -1e9).astype(queries.dtype)
        if isinstance(mask, mx.array):
            more = mx.where(mask, 0.0, -1e9) if mask.dtype == mx.bool_ else mask
            bias = bias + more.astype(bias.dtype)
        return attention(queries, keys, values, scale=scale, mask=bias, **named)

    def watched(self, *args, **named):
        features = embed(self, *args, **named)
        seen.append(True)
        return features

    mx.fast.scaled_dot_product_attention = unseen
    kind.get_input_embeddings = watched
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = attention
        kind.get_input_embeddings = embed


def test_equals_the_full_prompt_with_what_is_dropped_masked(loaded, monkeypatch):
    if loaded.family.name in RECURRENT:
        pytest.skip("a recurrent state has read what would be masked")
    rows, find = [], adapter.find_rows
    monkeypatch.setattr(
        adapter, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    with loaded.pruned(positions=loaded.original) as handle:
        answer, count = loaded.ask()
        (kept,) = handle.last
    assert kept.keep == kept.total // 2
    (row,) = rows[0]
    dropped = np.delete(row.visual, kept.indices)
    with masked(loaded.model, dropped):
        wanted, full = loaded.ask(prefill_step_size=None)
    assert answer == wanted
    assert full - count == len(dropped) or loaded.family.name == "fastvlm"
    assert answer != loaded.ask()[0]


def test_keeping_all_and_detaching_change_nothing(loaded):
    plain = loaded.ask()
    kind, spoken = type(loaded.model), type(loaded.model.language_model)
    attributes = set(vars(loaded.processor))
    with loaded.pruned(Pruner("norm", 1.0)):
        assert loaded.ask() == plain
    with loaded.pruned():
        assert loaded.ask() != plain
    assert loaded.ask() == plain
    assert type(loaded.model) is kind
    assert type(loaded.model.language_model) is spoken
    assert set(vars(loaded.processor)) == attributes


def test_chunks_change_nothing(loaded):
    with loaded.pruned(positions=loaded.original):
        assert loaded.ask(prefill_step_size=4) == loaded.ask()
    with loaded.pruned():
        assert loaded.ask(prefill_step_size=4) == loaded.ask()


def test_a_warm_chat_answers_as_a_cold_one(loaded):
    for positions in {None, loaded.original}:
        with loaded.pruned(positions=positions):
            state = PromptCacheState()
            loaded.ask(loaded.chat(), prompt_cache_state=state)
            second = loaded.chat("abc")
            warm = loaded.ask(second, prompt_cache_state=state)
            assert warm == loaded.ask(second)


def test_another_picture_is_not_answered_from_the_first_ones_cache(loaded):
    with loaded.pruned():
        state = PromptCacheState()
        loaded.ask(loaded.chat(), prompt_cache_state=state)
        second = loaded.chat("abc")
        other = loaded.files[1]
        warm = loaded.ask(second, other, prompt_cache_state=state)
        assert warm == loaded.ask(second, other)
        assert warm != loaded.ask(second)
