"""`attach` in mlx-vlm's generate, chats and batches, for each family."""

import dataclasses
import importlib
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

mlx_vlm = pytest.importorskip("mlx_vlm")

from mlx_vlm.generate import PromptCacheState  # noqa: E402
from mlx_vlm.prompt_utils import apply_chat_template  # noqa: E402
from mlx_vlm.utils import prepare_inputs  # noqa: E402
from vlm.families import FAMILIES, prompt  # noqa: E402
from vlm.loaded import (  # noqa: E402
    HALF,
    LENGTH,
    MORE,
    QUESTION,
    Loaded,
    masked,
    served,
)

from mlx_tokprune import InputError, Pruner  # noqa: E402
from mlx_tokprune.attach import hooks  # noqa: E402
from mlx_tokprune.attach.families import FAMILIES as KNOWN  # noqa: E402
from mlx_tokprune.attach.mlx_vlm import attach, check_known, name_of  # noqa: E402
from mlx_tokprune.features import Features  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("not_compiled"),
    pytest.mark.filterwarnings("ignore:.*getdata is deprecated"),  # Kimi's processors
]
PRUNED = [name for name in FAMILIES if name != "llava_next"]
# A state that has read a token cannot be told to have not.
RECURRENT = {
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "indic_ocr",
    "prism_hadamard_qwen35",
}
# Stock mlx-vlm is wrong here, or raises (docs/notes/upstream.md).
NO_BATCHES = {"qwen3_vl", "qwen3_vl_moe", "gemma3n", "gemma3", "paligemma"}
# Pictures of a batch have as many tiles (docs/notes/upstream.md); or all pictures have.
TILED = {"idefics2", "idefics3", "smolvlm"}
ONE_SIZE = {"llava", "molmo2", "fastvlm", "phi3_v", *TILED}
VIDEOS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision"}
VIDEOS |= {
    "qwen3_5_moe",
    "qwen3_vl_moe",
    "indic_ocr",
    "prism_hadamard_qwen35",
    "qwen4_exp",
    "smolvlm",
    "gemma4",
    "gemma4_large",
}


@pytest.fixture(scope="module", params=PRUNED)
def loaded(request, tmp_path_factory):
    return Loaded(FAMILIES[request.param], tmp_path_factory.mktemp(request.param) / "m")


def test_equals_the_full_prompt_with_what_is_dropped_masked(loaded, monkeypatch):
    if loaded.family.name in RECURRENT:
        pytest.skip("a recurrent state has read what would be masked")
    rows, find = [], hooks.find_rows
    monkeypatch.setattr(
        hooks, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    with loaded.pruned(positions=loaded.original) as handle:
        answer, count = loaded.ask()
        (kept,) = handle.last
    assert kept.keep == kept.total // 2
    (row,) = rows[0]
    dropped = np.delete(row.visual, kept.indices)
    # Stock Gemma 3n's first logits are others where its prompt is not read in steps.
    step = {} if loaded.family.name == "gemma3n" else {"prefill_step_size": None}
    with masked(loaded.model, dropped):
        wanted, full = loaded.ask(**step)
    assert answer == wanted
    assert full - count == len(dropped) or loaded.family.name == "fastvlm"
    assert answer != loaded.ask()[0]


def test_a_video_is_pruned_as_a_whole(loaded, monkeypatch):
    """A pruned video equals the video with the dropped tokens masked."""
    if loaded.family.name not in VIDEOS:
        pytest.skip("pictures only")
    shape = (4, *loaded.family.size[::-1], 3)
    frames = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    if loaded.family.name.startswith("gemma4"):
        frames = frames.transpose(0, 3, 1, 2)
    pictures = len(frames) if loaded.family.name == "smolvlm" else 0
    text = apply_chat_template(
        *(loaded.processor, loaded.model.config, QUESTION),
        **{"num_images": pictures, "video": "x.mp4"},
    )
    rows, find = [], hooks.find_rows
    monkeypatch.setattr(
        hooks, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    with loaded.pruned(positions=loaded.original) as handle:
        answer = loaded.ask(text, video=[frames])
        assert loaded.ask(text, video=[frames], prefill_step_size=4) == answer
        (kept,) = handle.last
    assert kept.keep == kept.total // 2
    if loaded.family.name in RECURRENT:
        return
    dropped = np.delete(rows[0][0].visual, kept.indices)
    with masked(loaded.model, dropped):
        wanted, full = loaded.ask(text, video=[frames], prefill_step_size=None)
    assert answer == (wanted, full - len(dropped))
    assert answer != loaded.ask(text, video=[frames])


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


def test_two_requests_are_answered_as_each_alone(loaded):
    if loaded.family.name in NO_BATCHES:
        pytest.skip("stock mlx-vlm does not do this")
    texts = [
        prompt(loaded.processor, loaded.model.config, text) for text in (QUESTION, MORE)
    ]
    narrow = loaded.files[1] if loaded.family.name in TILED else loaded.narrow
    both = list(zip(texts, [loaded.files[0], narrow], strict=True))
    with loaded.pruned() as handle:
        alone, totals = [], []
        for request in both:
            alone.append(loaded.ask(*request)[0])
            totals.append(handle.last[0].total)
        assert served(loaded, both) == alone
        assert handle.last[0].keep == handle.last[0].total // 2
    assert alone[0] != alone[1]
    assert (totals[0] != totals[1]) == (loaded.family.name not in ONE_SIZE)


# One family is enough for what follows ----------------------------------------------


def embedded(loaded) -> tuple[np.ndarray, mx.array, dict]:
    """Return ids (T,) of the question, embeddings (T, D), and other inputs."""
    text = prompt(loaded.processor, loaded.model.config, QUESTION)
    inputs = dict(
        prepare_inputs(loaded.processor, images=loaded.files[:1], prompts=text)
    )
    names = ("input_ids", "pixel_values", "attention_mask")
    ids, pixels, mask = (inputs.pop(name) for name in names)
    found = loaded.model.get_input_embeddings(ids, pixels, mask=mask, **inputs)
    return np.array(ids[0]), found.inputs_embeds[0], inputs


def grid_of(inputs: dict) -> tuple[int, int]:
    """Return (height, width) of Qwen2-VL's visual tokens of 2 x 2 patches."""
    _, height, width = np.array(inputs["image_grid_thw"])[0].tolist()
    return height // 2, width // 2


@pytest.mark.parametrize(
    "pruner",
    [
        Pruner("similarity", 0.5),
        Pruner("divprune", 0.3),
        Pruner("dart", 0.3),
        Pruner("cdpruner", 0.3),
        Pruner("random", keep_tokens=7, seed=3),
        Pruner("uniform", 0.5),
        Pruner("spatial", 0.3),
    ],
    ids=lambda pruner: pruner.method,
)
def test_methods_choose_as_they_do_here(qwen, pruner):
    """Methods in mlx-vlm choose the tokens that they choose on its embeddings."""
    ids, rows, inputs = embedded(qwen)
    where = np.flatnonzero(ids == qwen.model.config.image_token_id)
    extras = {}
    if "text" in pruner.needs:
        extras["text"] = rows[where[-1] + 1 :][None]
    features = Features(rows[mx.array(where)][None], grid_of(inputs), extras=extras)
    wanted = dataclasses.replace(pruner, at="prompt")(features)
    with qwen.pruned(pruner) as handle:
        _, count = qwen.ask()
        (kept,) = handle.last
    assert kept.indices.tolist() == np.array(wanted.indices[0]).tolist()
    assert count == len(ids) - len(where) + wanted.keep


def test_a_merged_token_is_what_the_method_makes_of_it(qwen):
    pruner = Pruner("spatial", 0.3)
    ids, whole, inputs = embedded(qwen)
    where = np.flatnonzero(ids == qwen.model.config.image_token_id)
    tokens = whole[mx.array(where)][None]
    selection = pruner(Features(tokens, grid_of(inputs)))
    with qwen.pruned(pruner):
        _, less, _ = embedded(qwen)
    start = where[0]
    found = less[start : start + selection.keep]
    assert mx.allclose(found, selection.apply(tokens)[0], atol=1e-6)
    assert mx.array_equal(less[:start], whole[:start])
    assert mx.array_equal(less[start + selection.keep :], whole[where[-1] + 1 :])


def test_a_budget_of_more_tokens_than_there_are_keeps_all(qwen):
    with qwen.pruned(Pruner("norm", keep_tokens=1000)):
        pruned = qwen.ask()
    assert pruned == qwen.ask()


def test_two_pictures_share_a_budget(qwen):
    text = prompt(qwen.processor, qwen.model.config, QUESTION, pictures=2)
    both = qwen.files[:2]

    def ask(**named):
        pieces = mlx_vlm.stream_generate(
            qwen.model, qwen.processor, text, image=both, max_tokens=LENGTH, **named
        )
        return list(pieces)[-1].token_ids

    with qwen.pruned() as handle:
        answer = ask()
        (kept,) = handle.last
        assert kept.runs == (30, 30)
        assert [len(place) for place in kept.places] != [15, 15]
        assert sum(map(len, kept.places)) == kept.keep == 30
        assert answer == ask(prefill_step_size=4)


def test_what_cannot_be_attached_is_refused(qwen, tmp_path):
    def refused(pruner, match, positions=None):
        with pytest.raises(InputError, match=match):
            attach(qwen.model, qwen.processor, pruner, positions)
        assert "process" not in vars(qwen.processor)

    refused(Pruner("lightvla"), "decides itself how many")
    refused(Pruner("trimvla", 0.5), "needs queries")
    refused(Pruner("attention", 0.5, at=2), "pruning is at 'prompt'")
    refused(Pruner("demo-adaptive", 0.5), "pruning is at 'prompt'")
    refused(HALF, "stay original", "contiguous")
    refused(HALF, "positions are", "somewhere")
    with qwen.pruned(), pytest.raises(InputError, match="detach it first"):
        attach(qwen.model, qwen.processor, HALF)
    family = FAMILIES["llava_next"]
    with pytest.raises(InputError, match="which row is which"):
        Loaded(family, tmp_path / "next").pruned().__enter__()
    for name in ("mllama", "florence2"):
        with pytest.raises(InputError, match="by cross attention"):
            check_known(name, HALF)


def with_pictures() -> dict[str, str]:
    """Return the family of each folder of mlx-vlm that makes embeddings of pictures."""
    families = {}
    for path in Path(mlx_vlm.__file__).parent.glob("models/*/__init__.py"):
        name = path.parent.name
        if name in KNOWN or re.search("VisionConfig|VisionModel", path.read_text()):
            model = importlib.import_module(f"mlx_vlm.models.{name}").Model
            if name in KNOWN or hasattr(model, "get_input_embeddings"):
                families[name] = name_of(model)
    return families


def test_the_documentation_says_what_is_tested():
    """The documented tables equal the tested capabilities, for all of mlx-vlm."""
    page = Path(__file__).parent.parent / "docs" / "mlx-vlm.md"
    rows = {
        name: [cell.strip() for cell in line.split("|")[2:-1]]
        for line in page.read_text().splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
        if "tiny" not in line.split("|")[1]
    }
    families = with_pictures()
    assert families.keys() - {"sam3", "sam3_1"} == rows.keys()  # which do not answer
    assert KNOWN.keys() <= families.keys()
    tested = {name.removesuffix("_large") for name in PRUNED}
    assert tested == {n for n in rows if not KNOWN[families[n]].why}
    for name, cells in rows.items():
        family = KNOWN[families[name]]
        assert (len(cells) == 1) == bool(family.why)
        if family.why:
            assert cells == [family.why]
            continue
        positions, chats, requests, video, attention = cells
        assert positions.startswith("original") == family.turns
        assert chats.startswith("read anew" if family.cold else "yes")
        assert requests.startswith("no:") == (name in NO_BATCHES)
        assert video.startswith("yes") == (name in VIDEOS)
        assert attention.startswith("yes" if family.tower else "no")


@pytest.mark.parametrize("seam", ["field", "process", "keywords"])
def test_a_version_with_other_seams_is_refused(qwen, monkeypatch, seam):
    if seam == "field":
        kind = adapter_features()
        other = dataclasses.make_dataclass(
            "Other", [("new_rows", object, None)], bases=(kind,)
        )
        monkeypatch.setattr("mlx_vlm.models.base.InputEmbeddingsFeatures", other)
    elif seam == "process":
        monkeypatch.setattr("mlx_vlm.utils.process_inputs", lambda *a, **k: {})
    else:
        kind = type(qwen.model)
        monkeypatch.setattr(kind, "get_input_embeddings", lambda self, ids, pixels: 0)
    with pytest.raises(InputError, match="which is not supported"):
        attach(qwen.model, qwen.processor, HALF)
    assert "process" not in vars(qwen.processor)


def adapter_features():
    from mlx_vlm.models.base import InputEmbeddingsFeatures

    return InputEmbeddingsFeatures


def test_original_positions_are_for_one_prompt_at_a_time(tmp_path):
    loaded = Loaded(FAMILIES["llava"], tmp_path / "m")
    text = prompt(loaded.processor, loaded.model.config, QUESTION)
    requests = [(text, file) for file in loaded.files[:2]]
    with loaded.pruned(positions="original"):
        with pytest.raises(InputError, match="one prompt at a time"):
            served(loaded, requests)


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "pixtral"])
def test_text_between_pictures_keeps_its_place(name, tmp_path, monkeypatch):
    loaded = Loaded(FAMILIES[name], tmp_path / "m")
    parts = [("one", "image"), ("and another", "image"), ("which is red ?", None)]
    content = [
        {"type": "text", "text": part} if part != "image" else {"type": "image"}
        for pair in parts
        for part in pair
        if part
    ]
    turns = [{"role": "user", "content": content}]
    text = apply_chat_template(
        loaded.processor, loaded.model.config, turns, num_images=2
    )
    rows, find = [], hooks.find_rows
    monkeypatch.setattr(
        hooks, "find_rows", lambda *args: rows.append(find(*args)) or rows[-1]
    )
    both = {"image": loaded.files[:2]}
    with loaded.pruned(positions=loaded.original) as handle:
        answer, count = loaded.ask(text, **both)
        assert loaded.ask(text, **both, prefill_step_size=4) == (answer, count)
        (kept,) = handle.last
    (row,) = rows[0]
    assert row.text[(row.text > row.visual[0]) & (row.text < row.visual[-1])].size > 10
    with masked(loaded.model, np.delete(row.visual, kept.indices)):
        wanted, full = loaded.ask(text, **both, prefill_step_size=None)
    assert (answer, count) == (wanted, full - kept.total + kept.keep)
    assert answer != loaded.ask(text, **both)[0]


@pytest.mark.parametrize("other", ["a picture", "text"])
def test_an_answer_is_not_read_on_behind_another_prompt(tmp_path, other):
    """A stream with original positions fails after another prompt has begun."""
    loaded = Loaded(FAMILIES["llava_onevision"], tmp_path / "m")
    text = prompt(loaded.processor, loaded.model.config, QUESTION)
    plain = apply_chat_template(loaded.processor, loaded.model.config, MORE)

    def begin(text, **named):
        named = {"max_tokens": LENGTH, "temperature": 0.0, **named}
        return mlx_vlm.stream_generate(loaded.model, loaded.processor, text, **named)

    more = {"a picture": (text, {"image": loaded.files[1:2]}), "text": (plain, {})}
    with loaded.pruned(positions="original"):
        first = begin(text, image=loaded.files[:1])
        next(first)
        asked, named = more[other]
        assert len(list(begin(asked, **named))) >= LENGTH
        with pytest.raises(InputError, match="another prompt was begun"):
            list(first)
        wanted = loaded.ask()
        assert len(wanted[0]) == LENGTH
    with loaded.pruned():  # contiguous ones are counted by each cache
        first = begin(text, image=loaded.files[:1])
        pieces = [next(first)]
        list(begin(asked, **named))
        pieces += list(first)
        assert pieces[-1].token_ids == loaded.ask()[0]
