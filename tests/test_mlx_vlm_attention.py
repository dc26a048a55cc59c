"""Methods that read the tower's attention in mlx-vlm use its queries and keys."""

import contextlib

import mlx.core as mx
import numpy as np
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402
from mlx_vlm.utils import prepare_inputs  # noqa: E402
from vlm.families import FAMILIES, prompt  # noqa: E402
from vlm.loaded import MORE, QUESTION, Loaded, masked, served  # noqa: E402

from mlx_tokprune import InputError, Pruner  # noqa: E402
from mlx_tokprune.attach import attention, hooks  # noqa: E402
from mlx_tokprune.attach.__main__ import main  # noqa: E402
from mlx_tokprune.attach.families import FAMILIES as KNOWN  # noqa: E402
from mlx_tokprune.attach.mlx_vlm import attach  # noqa: E402
from mlx_tokprune.attach.pixels import RepeatPruner, TemporalPruner  # noqa: E402
from mlx_tokprune.features import Features  # noqa: E402
from mlx_tokprune.pruners.registry import temporary  # noqa: E402
from mlx_tokprune.pruners.saliency import keep_highest  # noqa: E402

pytestmark = pytest.mark.usefixtures("not_compiled")
# Which of the attention calls of a tower are of the block that features come from.
GLM = ("glm4v", "glm4v_moe")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "qwen3_5_moe")
QWEN += ("qwen4_exp", *GLM)
SQUARES = {"idefics3": 2, "smolvlm": 2, "internvl_chat": 2, "gemma3": 2}
SQUARES |= {"paligemma": 1, "llava": 1, "fastvlm": 1}
CLASSED = {"llava", "internvl_chat"}
LINES = {"pixtral": 8, "mistral3": 4}  # pixels along a patch
GEMMA4 = ("gemma4", "gemma4_large")
READ = [*QWEN, *SQUARES, *LINES, *GEMMA4, "llava_onevision"]
# A state that has read a token cannot be told to have not.
RECURRENT = {"qwen3_5", "qwen3_5_moe", "qwen4_exp"}
HALF = Pruner("attention", 0.5)


@pytest.fixture(scope="module", params=READ)
def loaded(request, tmp_path_factory):
    return Loaded(FAMILIES[request.param], tmp_path_factory.mktemp(request.param) / "m")


# In NumPy, from what mlx-vlm gives its own attention -------------------------------


def inputs_of(loaded, files, video=None) -> dict:
    if video is not None:
        text = asked_about_video(loaded)
        return dict(
            prepare_inputs(loaded.processor, images=None, videos=[video], prompts=text)
        )
    text = prompt(loaded.processor, loaded.model.config, QUESTION, pictures=len(files))
    return dict(prepare_inputs(loaded.processor, images=files, prompts=text))


def asked_about_video(loaded) -> str:
    return apply_chat_template(
        *(loaded.processor, loaded.model.config, QUESTION), num_images=0, video="x.mp4"
    )


def embedded(model, inputs: dict):
    rest = dict(inputs)
    ids, mask = rest.pop("input_ids"), rest.pop("attention_mask")
    pixels = rest.pop("pixel_values", None)
    return model.get_input_embeddings(ids, pixels, mask=mask, **rest)


@contextlib.contextmanager
def spied():
    """Yield (queries, keys, scale, mask) of each attention call of MLX."""
    plain, calls = mx.fast.scaled_dot_product_attention, []

    def noting(q, k, v, *, scale, mask=None, **named):
        calls.append((np.array(q), np.array(k), scale, mask))
        return plain(q, k, v, scale=scale, mask=mask, **named)

    mx.fast.scaled_dot_product_attention = noting
    try:
        yield calls
    finally:
        mx.fast.scaled_dot_product_attention = plain


def asks_of(call, first: bool) -> np.ndarray:
    """Return (B, L) attention in float64, summed over queries, mean over heads."""
    q, k, scale, mask = call
    logits = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * scale
    if mask is not None:
        logits = logits + np.array(mask, np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights[:, :, :1].sum(2).mean(1) if first else weights.sum(2).mean(1)


def in_cells(patches: np.ndarray, height: int, width: int, side: int) -> np.ndarray:
    """Return (h * w,) sums over squares of patches."""
    whole = patches.reshape(height, width)
    return np.array(
        [
            whole[
                row * side : (row + 1) * side, column * side : (column + 1) * side
            ].sum()
            for row in range(height // side)
            for column in range(width // side)
        ]
    )


def in_windows(grid) -> np.ndarray:
    """Return groups of patches in the order of Qwen2.5-VL's 2 x 2 windows."""
    order, start = [], 0
    for frames, height, width in grid:
        rows, columns = height // 2, width // 2
        for _ in range(frames):
            own = start + np.arange(rows * columns).reshape(rows, columns)
            for row in range(0, rows, 2):
                for column in range(0, columns, 2):
                    order += own[row : row + 2, column : column + 2].ravel().tolist()
            start += rows * columns
    return np.array(order)


def expected(loaded, inputs: dict) -> np.ndarray:
    """Return (N,) attention that each visual token receives."""
    name = loaded.family.name
    with spied() as calls:
        mx.eval(embedded(loaded.model, inputs).inputs_embeds)
    calls = [call for call in calls if call[0].size]  # GLM asks about no patches, too
    if name in QWEN:
        grid = np.array(inputs.get("image_grid_thw", inputs.get("video_grid_thw")))
        last, patches = [], int(grid.prod(axis=1).sum())
        while sum(map(len, last)) < patches:  # a call for each frame, or GLM's for all
            last.insert(0, asks_of(calls.pop(), False)[0])
        groups = np.concatenate(last).reshape(-1, 4).sum(axis=1)
        if name == "qwen2_5_vl":
            order, plain = in_windows(grid.tolist()), groups
            groups = np.zeros_like(plain)
            groups[order] = plain
        return groups / (4 * len(groups))
    if name in SQUARES:
        call = calls[0] if name == "llava" else calls[-1]  # its config says the first
        asks = asks_of(call, name in CLASSED)
        asked = len(asks) * (1 if name in CLASSED else asks.shape[1])
        asks = asks[:, 1:] if name in CLASSED else asks
        length = round(asks.shape[1] ** 0.5)
        cells = [in_cells(one, length, length, SQUARES[name]) for one in asks]
        return np.concatenate(cells) / asked
    if name in GEMMA4:  # a call for each picture, or filled up behind
        pictures = [
            (q[number : number + 1], k[number : number + 1], scale)
            for q, k, scale, _ in calls[1::2]
            for number in range(len(q))
        ]
        places = inputs.get("image_position_ids", inputs.get("video_position_ids"))
        if places is None:
            sizes = [np.array(p.shape[-2:]) // 4 for p in inputs["pixel_values"]]
        else:
            places = np.array(places).reshape(len(pictures), -1, 2)
            sizes = [place.max(axis=0)[::-1] + 1 for place in places]
        found = []
        for (q, k, scale), (height, width) in zip(pictures, sizes, strict=True):
            some = (array[:, :, : height * width] for array in (q, k))
            asks = asks_of((*some, scale, None), False)[0]
            found.append(in_cells(asks, height, width, 2))
        return np.concatenate(found) / sum(height * width for height, width in sizes)
    asks = asks_of(calls[-1], False)
    if name in LINES:
        sizes = (
            np.array(inputs["image_sizes"]).reshape(-1, 2).astype(int) // LINES[name]
        )
        ends = np.cumsum(sizes.prod(axis=1))[:-1]
        cells = [
            in_cells(part, *size, 8 // LINES[name])
            for part, size in zip(np.split(asks[0], ends), sizes, strict=True)
        ]
        return np.concatenate(cells) / asks.shape[1]
    # Of LLaVA-OneVision the whole, then two tiles side by side, with ends of lines.
    found = []
    for whole, left, right in asks.reshape(-1, 3, 16):
        lines = np.concatenate([left.reshape(4, 4), right.reshape(4, 4)], axis=1)
        found += [whole, np.pad(lines, [(0, 0), (0, 1)]).ravel()]
    return np.concatenate(found) / asks.size


@contextlib.contextmanager
def probing(loaded, positions=None, ratio=0.5):
    """Prune by attention; yield the handle and the extras of the tower."""
    seen = []
    with temporary("probe", needs=("attention", "keys"), seeded=True) as register:

        @register
        def probe(features, *, keep, seed):
            seen.append(features.extras)
            return keep_highest(features.extras["attention"], keep)

        with loaded.pruned(Pruner("probe", ratio), positions) as handle:
            yield handle, seen


def highest(scores: np.ndarray, keep: int) -> list[int]:
    return np.sort(np.argsort(-scores, kind="stable")[:keep]).tolist()


def test_scores_are_those_of_its_queries_and_keys(loaded, monkeypatch):
    """Scores equal the tower's attention, and pruned answers equal masking."""
    wanted = expected(loaded, inputs_of(loaded, loaded.files[:1]))
    plain = loaded.ask()
    kinds = [type(module) for module in loaded.model.modules()]
    rows, find = [], hooks.find_rows
    monkeypatch.setattr(
        hooks, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    with probing(loaded, loaded.original) as (handle, seen):
        answer, count = loaded.ask()
        (kept,) = handle.last
        assert loaded.ask(prefill_step_size=4) == (answer, count)
    scores = np.array(seen[0]["attention"][0])
    assert np.allclose(scores, wanted, atol=1e-6, rtol=1e-4)
    assert scores.std() > 1e-3 * scores.mean()  # or there would be nothing to see
    assert kept.indices.tolist() == highest(wanted, kept.total // 2)
    with loaded.pruned(HALF, loaded.original) as handle:
        assert loaded.ask() == (answer, count)
        assert handle.last[0].indices.tolist() == kept.indices.tolist()
    # Nothing is left of it.
    assert [type(module) for module in loaded.model.modules()] == kinds
    assert loaded.ask() == plain
    if loaded.family.name in RECURRENT:
        return
    dropped = np.delete(rows[0][0].visual, kept.indices)
    with masked(loaded.model, dropped):
        assert loaded.ask(prefill_step_size=None)[0] == answer


def test_two_pictures_are_compared_by_all_their_patches(loaded):
    if loaded.family.name == "paligemma":
        pytest.skip("mlx-vlm reads one picture")
    files = loaded.files[:2]
    if loaded.family.name in (*QWEN, *LINES, *GEMMA4):  # the second half as wide
        files = [files[0], loaded.narrow]
    inputs = inputs_of(loaded, files)
    wanted = expected(loaded, inputs)
    with probing(loaded) as (handle, seen):
        embedded(loaded.model, inputs_of(loaded, files))
        (kept,) = handle.last
    assert len(wanted) == kept.total > loaded.family.rows(*loaded.family.size)
    scores = np.array(seen[0]["attention"][0])
    assert np.allclose(scores, wanted, atol=1e-6, rtol=1e-4)
    if loaded.family.name not in CLASSED | {"llava_onevision"}:
        assert scores.sum() == pytest.approx(1, abs=1e-4)
    assert kept.indices.tolist() == highest(wanted, kept.total // 2)


def test_videos(loaded, monkeypatch):
    """Scores of a video equal the attention within its frames."""
    name = loaded.family.name
    if name not in (*QWEN, *GEMMA4, "llava_onevision") or name in GLM:
        pytest.skip("pictures only")
    shape = (4, *loaded.family.size[::-1], 3)
    frames = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    if loaded.family.name in GEMMA4:
        frames = frames.transpose(0, 3, 1, 2)
    text = asked_about_video(loaded)
    rows, find = [], hooks.find_rows
    monkeypatch.setattr(
        hooks, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    with probing(loaded, loaded.original) as (handle, seen):
        answer, _ = loaded.ask(text, video=[frames])
        (kept,) = handle.last
    scores = np.array(seen[0]["attention"][0])
    assert kept.indices.tolist() == highest(scores, kept.total // 2)
    if loaded.family.name in (*QWEN, *GEMMA4):
        wanted = expected(loaded, inputs_of(loaded, [], frames))
        assert np.allclose(scores, wanted, atol=1e-6, rtol=1e-4)
    else:
        with spied() as calls:
            mx.eval(embedded(loaded.model, inputs_of(loaded, [], frames)).inputs_embeds)
        asks = asks_of(calls[-1], False)
        cells = [in_cells(frame, 4, 4, 2) for frame in asks]
        assert np.allclose(scores[:-1], np.concatenate(cells) / asks.size, rtol=1e-4)
        assert scores[-1] == 0  # the newline behind a video
    if loaded.family.name in RECURRENT:
        return
    with masked(loaded.model, np.delete(rows[0][0].visual, kept.indices)):
        assert loaded.ask(text, video=[frames], prefill_step_size=None)[0] == answer


def test_two_requests_are_answered_as_each_alone(loaded):
    if loaded.family.name in {"qwen3_vl", "qwen3_vl_moe", "gemma3", "paligemma"}:
        pytest.skip("stock mlx-vlm does not do this")
    texts = [
        prompt(loaded.processor, loaded.model.config, text) for text in (QUESTION, MORE)
    ]
    tiled = loaded.family.name in {"idefics3", "smolvlm"}  # as many for each
    narrow = loaded.files[1] if tiled else loaded.narrow
    both = list(zip(texts, [loaded.files[0], narrow], strict=True))
    with loaded.pruned(HALF):
        alone = [loaded.ask(*request)[0] for request in both]
        assert served(loaded, both) == alone
    assert alone[0] != alone[1]


# Merging by keys --------------------------------------------------------------------


@contextlib.contextmanager
def noted(module, name: str):
    """Yield the outputs of a module's matrix as NumPy arrays."""
    matrix, found = getattr(module, name), []

    def noting(x):
        found.append(np.array(matrix(x)))
        return mx.array(found[-1])

    setattr(module, name, noting)
    try:
        yield found
    finally:
        setattr(module, name, matrix)


def keys_of(loaded, inputs: dict) -> np.ndarray:
    """Return (N, d) unrotated keys of the last block, mean over a token's patches."""
    if loaded.family.name == "idefics3":
        module = loaded.model.vision_model.encoder.layers[-1].self_attn
        with noted(module, "k_proj") as found:
            mx.eval(embedded(loaded.model, inputs).inputs_embeds)
        tiles = found[0].reshape(len(found[0]), 8, 8, -1)
        cells = tiles.reshape(len(tiles), 4, 2, 4, 2, -1).mean(axis=(2, 4))
        return cells.reshape(-1, cells.shape[-1])
    with noted(loaded.model.vision_tower.blocks[-1].attn, "qkv") as found:
        mx.eval(embedded(loaded.model, inputs).inputs_embeds)
    _, keys, _ = np.split(found[0], 3, axis=1)
    plain = keys.reshape(-1, 4, keys.shape[1]).mean(axis=1)
    groups = np.zeros_like(plain)
    groups[in_windows(np.array(inputs["image_grid_thw"]).tolist())] = plain
    return groups


@pytest.fixture(scope="module", params=["qwen2_5_vl", "idefics3"])
def merging(request, tmp_path_factory):
    return Loaded(FAMILIES[request.param], tmp_path_factory.mktemp(request.param) / "m")


@pytest.mark.parametrize("method", ["visionzip", "prumerge", "prumerge_plus"])
def test_methods_merge_as_they_do_here(merging, method):
    inputs, pruner = inputs_of(merging, merging.files[:1]), Pruner(method, 0.5)
    ids = np.array(inputs["input_ids"][0])
    where = np.flatnonzero(ids == merging.family.image_token_id)
    rows = embedded(merging.model, inputs).inputs_embeds[0][mx.array(where)][None]
    scores = expected(merging, inputs).astype(np.float32)
    keys = keys_of(merging, inputs).astype(np.float32)
    with probing(merging) as (_, seen):
        merging.ask()
    assert np.allclose(np.array(seen[0]["keys"][0]), keys, atol=1e-5)
    extras = {"attention": mx.array(scores)[None], "keys": mx.array(keys)[None]}
    selection = pruner(Features(rows, None, extras=extras))
    with merging.pruned(pruner) as handle:
        less = embedded(merging.model, inputs_of(merging, merging.files[:1]))
        (kept,) = handle.last
    assert kept.indices.tolist() == np.array(selection.indices[0]).tolist()
    columns = where[kept.indices]
    text = np.delete(np.arange(len(ids)), where)
    places = np.searchsorted(np.sort(np.concatenate([text, columns])), columns)
    found = less.inputs_embeds[0][mx.array(places)]
    assert np.allclose(np.array(found), np.array(selection.apply(rows)[0]), atol=1e-4)


def test_hiprune_looks_at_a_middle_block(qwen):
    """HiPrune reads the first of two blocks as the middle block."""
    inputs = inputs_of(qwen, qwen.files[:1])
    with spied() as calls:
        mx.eval(embedded(qwen.model, inputs).inputs_embeds)
    asks = [asks_of(call, False)[0].reshape(-1, 4).sum(axis=1) for call in calls]
    middle, last = (mx.array(a.astype(np.float32) / (4 * len(a)))[None] for a in asks)
    extras = {"attention": last, "attention_middle": middle}
    pruner = Pruner("hiprune", 0.7, options={"alpha": 0.5})
    selection = pruner(Features(mx.zeros((1, 30, 2)), (5, 6), extras=extras))
    with qwen.pruned(pruner) as handle:
        qwen.ask()
        (kept,) = handle.last
    assert kept.indices.tolist() == np.array(selection.indices[0]).tolist()
    assert kept.indices.tolist() != highest(np.array(last[0]), kept.keep)


# One family is enough for what follows ----------------------------------------------


def test_few_queries_at_a_time_give_the_same(qwen, monkeypatch):
    with probing(qwen) as (_, seen):
        qwen.ask()
        for weights in (1, 2 * 120 * 7):  # one query at a time, and seven
            monkeypatch.setattr(attention, "_WEIGHTS", weights)
            qwen.ask()
    whole, *parts = (np.array(extras["attention"]) for extras in seen)
    for part in parts:
        assert np.allclose(part, whole, rtol=1e-5)


def test_features_from_a_cache_are_made_again(qwen):
    """Cached features are computed again, because they lack the attention."""
    inputs = inputs_of(qwen, qwen.files[:1])
    tower = qwen.model.vision_tower
    features = tower(inputs["pixel_values"], inputs["image_grid_thw"])
    with qwen.pruned(HALF):
        wanted = embedded(qwen.model, inputs_of(qwen, qwen.files[:1]))
        given = inputs_of(qwen, qwen.files[:1]) | {"cached_image_features": features}
        found = embedded(qwen.model, given)
    assert mx.array_equal(found.inputs_embeds, wanted.inputs_embeds)


def test_what_a_video_shows_first_then_what_is_attended_to(qwen):
    still = np.random.default_rng(0).integers(0, 255, (1, 24, 32, 3), np.uint8)
    frames = np.repeat(still, 4, axis=0)
    frames[2:, :, 16:] = 255 - frames[2:, :, 16:]
    pruners = [TemporalPruner(0.05), HALF]
    with qwen.pruned(pruners) as handle:
        qwen.ask(asked_about_video(qwen), video=[frames])
        (kept,) = handle.last
    scores = expected(qwen, inputs_of(qwen, [], frames))
    stays = [*range(12), *(12 + n for n in range(12) if n % 4 >= 2)]
    best = highest(scores[stays], len(stays) // 2)
    assert kept.indices.tolist() == [stays[n] for n in best]


def test_a_folder_prunes_by_attention(qwen, tmp_path):
    asked = ["--method", "attention", "--keep-ratio", "0.5"]
    target = str(tmp_path / "pruned")
    main(["--model", str(qwen.folder), "--mlx-path", target, *asked])
    model, processor = mlx_vlm.load(target)
    pieces = mlx_vlm.stream_generate(
        *(model, processor, prompt(processor, model.config, QUESTION)),
        **{"image": qwen.files[:1], "max_tokens": 8, "temperature": 0.0},
    )
    with qwen.pruned(HALF):
        assert list(pieces)[-1].token_ids == qwen.ask()[0]


def test_what_is_refused(qwen, tmp_path, monkeypatch):
    def refused(loaded, match: str, pruner=HALF) -> None:
        with pytest.raises(InputError, match=match):
            attach(loaded.model, loaded.processor, pruner)
        assert "process" not in vars(loaded.processor)

    attending = {name for name, family in KNOWN.items() if family.tower}
    assert attending == {name.removesuffix("_large") for name in READ} & KNOWN.keys()
    for name in ("gemma3n", "phi3_v"):
        refused(Loaded(FAMILIES[name], tmp_path / name), "needs attention")
    refused(qwen, "were left out", [RepeatPruner(), HALF])
    kind = type(qwen.model.vision_tower.blocks[-1].attn)
    monkeypatch.setattr(kind, "__call__", lambda self, x, windows: x)
    refused(qwen, "in a way that is not supported")


def test_pictures_beside_a_video_are_refused(tmp_path):
    """An image beside a video is refused for Qwen3-VL."""
    loaded = Loaded(FAMILIES["qwen3_vl"], tmp_path / "m")
    frames = np.zeros((4, 40, 48, 3), np.uint8)
    given = inputs_of(loaded, loaded.files[:1]) | {
        name: value
        for name, value in inputs_of(loaded, [], frames).items()
        if "video" in name
    }
    with loaded.pruned(HALF) as handle:
        with pytest.raises(InputError, match="pictures and videos"):
            handle._hooks.shortened(given)
