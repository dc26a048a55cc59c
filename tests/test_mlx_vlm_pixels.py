"""Pruning by pixels in mlx-vlm: unchanged frames, repeated patches."""

import contextlib
import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.generate import PromptCacheState  # noqa: E402
from mlx_vlm.utils import prepare_inputs  # noqa: E402
from vlm.families import FAMILIES, prompt  # noqa: E402
from vlm.loaded import (  # noqa: E402
    LENGTH,
    MORE,
    QUESTION,
    Loaded,
    masked,
    served,
)

from mlx_tokprune import InputError, Pruner  # noqa: E402
from mlx_tokprune.attach import hooks  # noqa: E402
from mlx_tokprune.attach.__main__ import build_parser, main  # noqa: E402
from mlx_tokprune.attach.mlx_vlm import attach  # noqa: E402
from mlx_tokprune.attach.pixels import RepeatPruner, TemporalPruner  # noqa: E402

pytestmark = pytest.mark.usefixtures("not_compiled")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
# A state that has read a token cannot be told to have not.
RECURRENT = {"qwen3_5"}
SIDE = 8  # pixels along a visual token of the tiny models
# Of 5 x 6 groups: a black row above and below, and a square of four equal ones.
SCREEN = [0, *range(6, 12), 12, 13, 14, 16, 17, 18, 19, 22, 23]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return a factory of families by name, each written once."""
    made = {}

    def get(name: str) -> Loaded:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "m"
            made[name] = Loaded(FAMILIES[name], folder)
            for seed in (0, 1):
                file = folder / f"screen{seed}.png"
                Image.fromarray(screen(seed)).save(file)
                made[name].files.append(str(file))
            noise(40, 48).save(folder / "noise.png")
            made[name].files.append(str(folder / "noise.png"))
        return made[name]

    return get


@pytest.fixture(params=QWEN)
def loaded(request, drawn):
    return drawn(request.param)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def screen(seed: int = 0) -> np.ndarray:
    """Return an image with repeats, whose other groups are `SCREEN`."""
    found = np.array(noise(40, 48, seed))
    cells = found.reshape(5, SIDE, 6, SIDE, 3).swapaxes(1, 2)
    cells[0] = cells[4] = 0
    cells[2, 3] = cells[3, 2] = cells[3, 3] = cells[2, 2]
    return cells.swapaxes(1, 2).reshape(40, 48, 3)


def film(*, moved: tuple[int, ...] = (), still: bool = True) -> np.ndarray:
    """Return (6, 3, 24, 24): three frames of 3 x 3 groups; `moved` frames change."""
    frames = np.random.default_rng(5).integers(0, 256, (6, 3, 24, 24), np.uint8)
    if still:
        frames[:] = frames[0]
    cells = frames.reshape(6, 3, 3, SIDE, 3, SIDE)
    for frame in moved:
        cells[2 * frame :, :, 1, :, 2] += np.uint8(40)
    return cells.reshape(frames.shape)


def watch(loaded, video: np.ndarray, **named):
    """Return the ids of a greedy answer about a video, and the prompt's length."""
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False,
        add_generation_prompt=True,
    )
    *_, last = mlx_vlm.stream_generate(
        *(loaded.model, loaded.processor, text),
        **{"video": [video], "max_tokens": LENGTH, "temperature": 0.0, **named},
    )
    return last.token_ids, last.prompt_tokens


def test_thresholds_are_of_pixels(drawn):
    """The threshold applies to pixels, whatever the processor's normalisation."""
    loaded = drawn("qwen2_vl")
    values = np.full((8, 16, 3), 100, np.uint8)
    values[:, 8:] = 105
    file = str(loaded.folder / "two.png")
    Image.fromarray(values).save(file)
    part, before = loaded.processor.image_processor, None
    before = part.image_std
    for part.image_std in (before, [0.2, 0.3, 0.4]):
        for threshold, keep in ((4.5 / 255, 2), (5.5 / 255, 1)):
            with loaded.pruned(RepeatPruner(threshold)) as handle:
                loaded.ask(file=file)
                assert handle.last[0].keep == keep
    part.image_std = before


# The tower --------------------------------------------------------------------------


def inputs_of(loaded, file: str) -> dict:
    text = prompt(loaded.processor, loaded.model.config, QUESTION)
    return dict(prepare_inputs(loaded.processor, images=[file], prompts=text))


def tower_rows(loaded, inputs) -> list[mx.array]:
    """Return the tower's output, and the outputs of earlier layers if it has them."""
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    found = loaded.model.vision_tower(pixels, grid)
    return [found[0], *found[1]] if isinstance(found, tuple) else [found]


@contextlib.contextmanager
def tower_masked(loaded, grid, left_out):
    """Mask the patches of the `left_out` groups of a (1, 3) grid in the tower."""
    attention, tower = mx.fast.scaled_dot_product_attention, loaded.model.vision_tower
    order, at = np.arange(np.prod(grid) // 4), [0]
    if hasattr(tower, "get_window_index"):
        order = np.array(tower.get_window_index(mx.array(grid))[0])
    gone = np.isin(order, left_out).repeat(4)

    def unseen(queries, keys, values, *, scale, mask=None, **named):
        length = queries.shape[-2]
        if mask is None and length > 1 and length == keys.shape[-2]:
            part = gone[at[0] : at[0] + length]
            at[0] = (at[0] + length) % len(gone)
            bias = mx.where(mx.array(part), -1e9, 0.0)[None].astype(queries.dtype)
            mask = mx.broadcast_to(bias, (length, length))
        return attention(queries, keys, values, scale=scale, mask=mask, **named)

    mx.fast.scaled_dot_product_attention = unseen
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = attention


@pytest.fixture
def lengths(loaded, monkeypatch) -> list[int]:
    """Return a list that collects the number of patches of each tower block."""
    block, found = type(loaded.model.vision_tower.blocks[0]), []
    call = block.__call__

    def watched(self, hidden, *args, **named):
        found.append(len(hidden))
        return call(self, hidden, *args, **named)

    monkeypatch.setattr(block, "__call__", watched)
    return found


def test_the_tower_equals_the_whole_one_with_what_is_left_out_masked(
    loaded, lengths, monkeypatch
):
    file, stays = loaded.files[3], mx.array(SCREEN)
    inputs, kind = inputs_of(loaded, file), type(loaded.model.vision_tower)
    whole = tower_rows(loaded, inputs)
    dropped = np.setdiff1d(np.arange(30), SCREEN)
    with tower_masked(loaded, [[1, 10, 12]], dropped):
        wanted = tower_rows(loaded, inputs)
    lengths.clear()
    found = []
    with loaded.pruned(RepeatPruner()) as handle:
        tower = type(loaded.model.vision_tower)
        call = tower.__call__
        monkeypatch.setattr(
            tower, "__call__", lambda *a, **k: found.append(call(*a, **k)) or found[-1]
        )
        loaded.ask(file=file)
        (kept,) = handle.last
    assert type(loaded.model.vision_tower) is kind
    assert kept.indices.tolist() == SCREEN
    assert (kept.keep, kept.encoded) == (16, 16)
    assert set(lengths) == {4 * 16}
    (rows,) = found
    rows = [rows[0], *rows[1]] if isinstance(rows, tuple) else [rows]
    for one, other, full in zip(rows, wanted, whole, strict=True):
        assert mx.allclose(one[stays], other[stays], atol=1e-4, rtol=1e-4)
        assert not mx.allclose(one[stays], full[stays], atol=1e-2, rtol=1e-2)
        for group, like in ((1, 0), (15, 14), (20, 14), (21, 14), (29, 0)):
            assert mx.array_equal(one[group], one[like])


def test_frames_of_a_video_are_apart_in_the_tower(loaded, lengths, monkeypatch):
    """Repeats are dropped within each frame, and the tower equals masking them."""
    rows, video = visual_columns(monkeypatch), film(still=False)
    cells = video.reshape(6, 3, 3, SIDE, 3, SIDE)
    cells[2:4, :, 1, :, 2] = cells[2:4, :, 1, :, 1]
    cells[4:] = 0
    dropped = [9 + 5, *range(19, 27)]
    with loaded.pruned(RepeatPruner()) as handle:
        less, _ = embedded(loaded, video)
        (kept,) = handle.last
    assert kept.indices.tolist() == np.delete(np.arange(27), dropped).tolist()
    assert set(lengths) == {4 * 18}
    with tower_masked(loaded, [[3, 6, 6]], dropped):
        whole, _ = embedded(loaded, video)
    columns = np.delete(np.arange(len(whole)), rows[0][0].visual[dropped])
    assert mx.allclose(less, whole[mx.array(columns)], atol=1e-4, rtol=1e-4)


def test_windows_hold_the_same_patches_without_those_left_out(drawn):
    from mlx_tokprune.attach.towers import Part

    tower = drawn("qwen2_5_vl").model.vision_tower
    grid = mx.array([[1, 10, 12], [2, 6, 8]])  # 30 groups, and two frames of 12
    order, ends = (np.array(part) for part in tower.get_window_index(grid))
    source = np.arange(54)
    dropped = [0, 1, 6, 7, 20, 29, 31, 53, *range(42, 46)]
    source[dropped] = 2
    part = Part.of(source, grid, 4)
    assert part.grid.tolist() == [[1, 96, 1], [1, 44, 1], [1, 28, 1]]
    fewer, limits = (np.array(p) for p in part.windows(mx.array(order), mx.array(ends)))
    assert np.all(np.diff(limits) > 0)
    groups = np.flatnonzero(source == np.arange(54))

    def windows(order, ends) -> list[list[int]]:
        return [order[a // 4 : b // 4].tolist() for a, b in itertools.pairwise(ends)]

    wanted = [[g for g in w if g not in dropped] for w in windows(order, ends)]
    assert windows(groups[fewer], limits) == [w for w in wanted if w]


def test_a_picture_without_repeats_is_bit_equal(loaded):
    file = loaded.files[5]
    inputs, plain = inputs_of(loaded, file), loaded.ask(file=file)
    wanted = tower_rows(loaded, inputs)
    with loaded.pruned([RepeatPruner(), TemporalPruner(0.0)]) as handle:
        assert loaded.ask(file=loaded.files[3])[1] == plain[1] - 14
        assert handle.last[0].keep == 16
        assert loaded.ask(file=file) == plain
        (kept,) = handle.last
        again = inputs_of(loaded, file)
        assert not any(name.startswith("tokprune") for name in again)
        found = tower_rows(loaded, again)
    assert (kept.total, kept.keep, kept.encoded) == (30, 30, 30)
    assert kept.indices.tolist() == list(range(30))
    assert all(mx.array_equal(*pair) for pair in zip(found, wanted, strict=True))


# Answers ----------------------------------------------------------------------------


def visual_columns(monkeypatch) -> list:
    """Return a list that collects the visual positions of each prompt."""
    rows, find = [], hooks.find_rows
    monkeypatch.setattr(
        hooks, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    return rows


def test_an_answer_equals_that_with_repeats_masked_everywhere(loaded, monkeypatch):
    if loaded.family.name in RECURRENT:
        pytest.skip("a recurrent state has read what would be masked")
    file, rows = loaded.files[3], visual_columns(monkeypatch)
    with loaded.pruned(RepeatPruner()):
        answer, count = loaded.ask(file=file)
    dropped = np.setdiff1d(np.arange(30), SCREEN)
    with tower_masked(loaded, [[1, 10, 12]], dropped):
        with masked(loaded.model, rows[0][0].visual[dropped]):
            wanted, full = loaded.ask(file=file, prefill_step_size=None)
    assert answer == wanted != loaded.ask(file=file)[0]
    assert full - count == len(dropped)


def test_an_answer_equals_that_with_still_places_masked(loaded, monkeypatch):
    if loaded.family.name in RECURRENT:
        pytest.skip("a recurrent state has read what would be masked")
    rows, video = visual_columns(monkeypatch), film(moved=(2,))
    with loaded.pruned(TemporalPruner(0.05)) as handle:
        answer, count = watch(loaded, video)
        (kept,) = handle.last
    assert kept.indices.tolist() == [*range(9), 23]
    assert (kept.total, kept.encoded) == (27, 27)
    dropped = np.delete(rows[0][0].visual, kept.indices)
    with masked(loaded.model, dropped):
        wanted, full = watch(loaded, video, prefill_step_size=None)
    assert answer == wanted != watch(loaded, video)[0]
    assert full - count == 17


def embedded(loaded, video, image=None) -> tuple[mx.array, mx.array]:
    """Return the embeddings and positions that the language model receives."""
    content = [{"type": "video"}, *([{"type": "image"}] if image else [])]
    text = loaded.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False
    )
    media = {"videos": [video], "images": image and [image]}
    inputs = dict(prepare_inputs(loaded.processor, prompts=text, **media))
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    named = {"pixel_values": None, "mask": mask, **inputs}
    found = loaded.model.get_input_embeddings(ids, **named)
    grids = [inputs.get(f"{kind}_grid_thw") for kind in ("image", "video")]
    positions, _ = loaded.model.language_model.get_rope_index(ids, *grids, mask)
    assert mx.array_equal(positions, found.position_ids)  # as chats ask for them
    return found.inputs_embeds[0], positions


def test_kept_tokens_are_where_they_were(loaded, monkeypatch):
    rows, video = visual_columns(monkeypatch), film(moved=(1,))
    whole, places = embedded(loaded, video)
    pruners = [TemporalPruner(0.0), RepeatPruner(0.0)]
    with loaded.pruned(pruners) as handle:
        less, positions = embedded(loaded, video)
        (kept,) = handle.last
    assert kept.indices.tolist() == [*range(9), 14]
    row = rows[0][0]
    columns = np.sort(np.concatenate([row.text, row.visual[kept.indices]]))
    assert mx.array_equal(less, whole[mx.array(columns)])
    assert mx.array_equal(positions, mx.take(places, mx.array(columns), -1))


def test_still_frames_leave_the_first_and_a_storm_leaves_all(loaded):
    plain = watch(loaded, film(still=False))
    with loaded.pruned(TemporalPruner(0.0)) as handle:
        assert watch(loaded, film(still=False)) == plain
        assert handle.last[0].keep == 27
        watch(loaded, film())
        assert handle.last[0].indices.tolist() == list(range(9))
    with loaded.pruned(TemporalPruner(0.0, max_age=2)) as handle:
        watch(loaded, film())
        assert handle.last[0].indices.tolist() == [*range(9), *range(18, 27)]


def test_chunks_and_warm_chats_change_nothing(loaded):
    file = loaded.files[3]
    with loaded.pruned(RepeatPruner()):
        state = PromptCacheState()
        loaded.ask(loaded.chat(), file, prompt_cache_state=state)
        second = loaded.chat("abc")
        cold = loaded.ask(second, file)
        assert loaded.ask(second, file, prompt_cache_state=state) == cold
        assert loaded.ask(second, file, prefill_step_size=4) == cold
        other, state = loaded.files[4], PromptCacheState()  # of as many tokens
        loaded.ask(loaded.chat(), file, prompt_cache_state=state)
        warm = loaded.ask(second, other, prompt_cache_state=state)
        assert warm == loaded.ask(second, other) != cold


def test_a_picture_and_a_video_of_as_many_groups(drawn, tmp_path):
    """An image and a video of equal size are pruned by their own repeats."""
    loaded, video = drawn("qwen3_vl"), film(still=False)[:2]
    image = np.array(noise(24, 24, seed=1))
    image[:, :SIDE] = 0
    video.reshape(2, 3, 3, SIDE, 3, SIDE)[:, :, 2] = 0
    file = str(tmp_path / "part.png")
    Image.fromarray(image).save(file)
    with loaded.pruned(RepeatPruner()) as handle:
        both, _ = embedded(loaded, video, file)
        (kept,) = handle.last
        alone, _ = embedded(loaded, video)
    of_image, of_video = [0, 1, 2, 4, 5, 7, 8], [0, 1, 2, 3, 4, 5, 6]
    assert kept.places == [of_video, of_image]
    assert mx.array_equal(both[: len(alone) - 1], alone[:-1])


def test_features_of_a_cache_leave_nothing_behind(drawn):
    loaded = drawn("qwen2_vl")
    plain = tower_rows(loaded, inputs_of(loaded, loaded.files[3]))
    with loaded.pruned(RepeatPruner()):
        inputs = inputs_of(loaded, loaded.files[3])
        ids, pixels = inputs.pop("input_ids"), inputs["pixel_values"]
        mask = inputs.pop("attention_mask")
        cached = {"mask": mask, "cached_image_features": plain[0], **inputs}
        found = loaded.model.get_input_embeddings(ids, **cached).inputs_embeds[0]
        again = loaded.model.vision_tower(pixels, inputs["image_grid_thw"])
    assert len(found) == ids.shape[1]
    assert mx.array_equal(again, plain[0])


def test_two_requests_at_once_are_answered_as_each_alone(drawn):
    loaded = drawn("qwen2_5_vl")
    texts = [
        prompt(loaded.processor, loaded.model.config, text) for text in (QUESTION, MORE)
    ]
    both = list(zip(texts, (loaded.files[3], loaded.files[0]), strict=True))
    with loaded.pruned(RepeatPruner()):
        alone = [loaded.ask(*request) for request in both]
        assert served(loaded, both) == [ids for ids, _ in alone]
    assert alone[0][1] < alone[1][1]


def test_a_budget_is_of_what_is_left(drawn):
    loaded = drawn("qwen2_vl")
    file = loaded.files[3]
    with loaded.pruned([RepeatPruner(), Pruner("norm", 0.5)]) as handle:
        _, count = loaded.ask(file=file)
        (kept,) = handle.last
    assert (kept.total, kept.encoded, kept.keep) == (30, 16, 8)
    assert set(kept.indices.tolist()) < set(SCREEN)
    assert loaded.ask(file=file)[1] - count == 22


def test_two_pictures_are_looked_at_apart(drawn):
    loaded = drawn("qwen2_5_vl")
    text = prompt(loaded.processor, loaded.model.config, QUESTION, pictures=2)
    named = {"max_tokens": LENGTH, "image": [loaded.files[3], loaded.files[5]]}
    with loaded.pruned(RepeatPruner()) as handle:
        list(mlx_vlm.stream_generate(loaded.model, loaded.processor, text, **named))
        (kept,) = handle.last
    assert kept.places == [SCREEN, list(range(30))]


# What is refused, and folders -------------------------------------------------------


def test_what_cannot_be_attached_is_refused(drawn, tmp_path, monkeypatch):
    loaded = drawn("qwen2_vl")

    def refused(pruner, match):
        with pytest.raises(InputError, match=match):
            attach(loaded.model, loaded.processor, pruner)
        assert "process" not in vars(loaded.processor)
        assert "_tokprune" not in vars(type(loaded.model.vision_tower))

    refused([], "expected one")
    refused([RepeatPruner(), RepeatPruner(0.1)], "two of RepeatPruner")
    refused([RepeatPruner(), Pruner("norm", 0.5), Pruner("dart", 0.5)], "expected one")
    refused([RepeatPruner(), Pruner("spatial", 0.5)], "leaves holes")
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="expected \\[0, 1\\)"):
            RepeatPruner(wrong)
    with pytest.raises(InputError, match="frames from 1"):
        TemporalPruner(0.1, max_age=0)
    tower = type(loaded.model.vision_tower)
    monkeypatch.setattr(tower, "other", lambda self, grid_thw: 0, raising=False)
    refused(RepeatPruner(), "asks for grids in other")
    llava = Loaded(FAMILIES["llava"], tmp_path / "llava")
    with pytest.raises(InputError, match="expected one of qwen2_vl"):
        attach(llava.model, llava.processor, RepeatPruner())


def test_a_folder_looks_at_pixels(drawn, tmp_path, capsys):
    loaded, target = drawn("qwen2_5_vl"), tmp_path / "pruned"
    stock = ["--model", str(loaded.folder), "--mlx-path", str(target)]
    for wrong in (["--max-age", "3"], ["--method", "dart", "--temporal", "0"], []):
        with pytest.raises(SystemExit):
            main([*stock, *wrong])
    assert "nothing would be pruned" in capsys.readouterr().err
    old = build_parser().parse_args([*stock, "--temporal", "0.05"])
    assert old.drop_unchanged == 0.05
    main([*stock, "--drop-unchanged", "0.05", "--max-age", "2", "--drop-repeats", "0"])
    settings = json.loads((target / "tokprune.json").read_text())
    assert settings["pixels"] == {
        "temporal": {"threshold": 0.05, "max_age": 2},
        "repeats": {"threshold": 0.0},
    }
    pruners = [TemporalPruner(0.05, 2), RepeatPruner()]
    file, video = loaded.files[3], film(moved=(2,))
    with loaded.pruned(pruners):
        wanted = loaded.ask(file=file), watch(loaded, video)
    stocked = Loaded.__new__(Loaded)
    stocked.model, stocked.processor = mlx_vlm.load(str(target))
    stocked.files = loaded.files
    assert (stocked.ask(file=file), watch(stocked, video)) == wanted
    assert wanted != (loaded.ask(file=file), watch(loaded, video))
