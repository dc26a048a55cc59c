"""Unusual and wrong uses of `attach` with mlx-vlm's models."""

import mlx.core as mx
import numpy as np
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.generate import PromptCacheState  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402
from mlx_vlm.utils import prepare_inputs  # noqa: E402
from vlm.families import prompt  # noqa: E402
from vlm.loaded import (  # noqa: E402
    HALF,
    MORE,
    QUESTION,
)

from mlx_tokprune import InputError, Pruner  # noqa: E402
from mlx_tokprune.attach import hooks  # noqa: E402
from mlx_tokprune.attach.mlx_vlm import attach  # noqa: E402
from mlx_tokprune.attach.model_folder import write_folder  # noqa: E402

pytestmark = pytest.mark.usefixtures("not_compiled")


@pytest.mark.parametrize("method", ["uniform", "spatial", "hiprune", "norm"])
def test_pictures_of_a_batch_have_their_own_grids(qwen, method):
    """Images in one call for two prompts are pruned as in separate calls."""
    narrow = qwen.narrow
    asked = [
        (prompt(qwen.processor, qwen.model.config, QUESTION, pictures=n), files)
        for n, files in ((1, [narrow]), (2, [qwen.files[0], narrow]))
    ]

    def embed(texts: list[str], files: list[str]) -> mx.array:
        inputs = dict(prepare_inputs(qwen.processor, images=files, prompts=texts))
        names = ("input_ids", "pixel_values", "attention_mask")
        ids, pixels, mask = (inputs.pop(name) for name in names)
        found = qwen.model.get_input_embeddings(ids, pixels, mask=mask, **inputs)
        rows = zip(found.inputs_embeds, np.array(mask), strict=True)
        return [row[mx.array(np.flatnonzero(seen))] for row, seen in rows]

    with qwen.pruned(Pruner(method, 0.3)) as handle:
        alone = [(*embed([text], files), *handle.last) for text, files in asked]
        texts = [text for text, _ in asked]
        both = embed(texts, [file for _, files in asked for file in files])
        batch = handle.last
    for (rows, kept), other, found in zip(alone, both, batch, strict=True):
        assert found.places == kept.places
        assert mx.allclose(other, rows, atol=1e-5)
    assert batch[0].total == 15
    assert batch[1].runs == (30, 15)


def test_a_folder_that_prunes_says_so(qwen, tmp_path):
    """Attaching to a model whose folder prunes on load is refused."""
    target = tmp_path / "pruned"
    write_folder(qwen.folder, target, HALF)
    model, processor = mlx_vlm.load(str(target))
    with pytest.raises(InputError, match="pruned prunes by itself"):
        attach(model, processor, HALF)


def test_a_processor_belongs_to_one_model(qwen):
    """Attaching a second model to one processor is refused."""
    other, _ = mlx_vlm.load(str(qwen.folder))
    with qwen.pruned(), pytest.raises(InputError, match="processor of its own"):
        attach(other, qwen.processor, HALF)
    with pytest.raises(TypeError):
        attach(qwen.model, object(), HALF)
    assert "_tokprune" not in vars(type(qwen.model))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (HALF, Pruner("random", 0.5)),
        (None, Pruner("norm", keep_tokens=2)),
        (None, Pruner("norm", keep_tokens=1)),
        (Pruner("norm", keep_tokens=2), Pruner("norm", keep_tokens=3)),
    ],
)
def test_a_chat_goes_on_rightly_under_another_pruner(qwen, first, then):
    state, second = PromptCacheState(), qwen.chat("abc")
    with qwen.pruned(first or Pruner("norm", 1.0)):
        qwen.ask(qwen.chat(), prompt_cache_state=state)
    with qwen.pruned(then):
        warm = qwen.ask(second, prompt_cache_state=state)
        assert warm == qwen.ask(second)


def test_a_prompt_of_long_ago_is_read_anew(qwen, monkeypatch):
    monkeypatch.setattr(hooks, "_REMEMBERED", 1)
    state, second = PromptCacheState(), qwen.chat("abc")
    with qwen.pruned() as handle:
        qwen.ask(qwen.chat(), prompt_cache_state=state)
        shortened = handle._hooks.shortened

        def late(given):
            found = shortened(given)
            shortened(prepared)  # of somebody else
            return found

        prepared = prepare_inputs(
            qwen.processor, images=qwen.files[1:2], prompts=second
        )
        cold = qwen.ask(second)
        monkeypatch.setattr(handle._hooks, "shortened", late)
        assert qwen.ask(second, prompt_cache_state=state) == cold


def test_what_was_kept_last_is_of_the_last_prompt(qwen):
    with qwen.pruned() as handle:
        qwen.ask()
        assert handle.last[0].keep == 15
        text = apply_chat_template(qwen.processor, qwen.model.config, MORE)
        list(mlx_vlm.stream_generate(qwen.model, qwen.processor, text, max_tokens=2))
        assert handle.last == ()


@pytest.mark.parametrize("wrong", ["fewer", "more", "backwards"])
def test_a_method_that_does_not_keep_its_budget(qwen, tmp_path, monkeypatch, wrong):
    kinds = {
        "fewer": "mx.arange(keep - 1)",
        "more": "mx.arange(keep + 1)",
        "backwards": "mx.arange(keep)[::-1]",
    }
    (tmp_path / f"guest_{wrong}.py").write_text(
        "import mlx.core as mx\n"
        "from mlx_tokprune.features import Selection\n"
        "def choose(features, *, keep):\n"
        f"    return Selection({kinds[wrong]}[None].astype(mx.int32))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with qwen.pruned(Pruner(f"guest_{wrong}:choose", 0.5)):
        with pytest.raises(InputError, match="expected 15, each once"):
            qwen.ask()
    assert qwen.ask()


def test_a_single_token_does_not_tell_pictures_apart(qwen):
    """A warm chat with another image of equal ids answers like a cold chat."""
    state, second = PromptCacheState(), qwen.chat("abc")
    with qwen.pruned(Pruner("norm", keep_tokens=1)):
        qwen.ask(qwen.chat(), prompt_cache_state=state)
        other = qwen.files[1]
        warm = qwen.ask(second, other, prompt_cache_state=state)
        assert warm == qwen.ask(second, other)
