"""Time to first token: one prefill, memory, input size."""

import json

import mlx.core as mx
import pytest
from asking import IMAGE, QUESTIONS, answer, scene_of
from conftest import TINY

from mlx_tokprune import Pruner, generate, stream_generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.errors import InputError
from mlx_tokprune.generate import image_size as sizes
from mlx_tokprune.generate.__main__ import main as command
from mlx_tokprune.generate.memory import Memory
from mlx_tokprune.models.positions import LayerCache, TokenPositions
from mlx_tokprune.pipeline import assemble, look, run
from mlx_tokprune.pipeline.timing import NoClock
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.pruners import as_plan

# Prefill ----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_tokens_are_those_of_mlx_lm(demo, positions, temp):
    """Tokens equal those of mlx-lm, which reads the last prompt token alone."""
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler

    model, processor = demo
    pruner, image = Pruner("norm", keep_ratio=0.5), load_image(PICTURES[0].path)
    plan, scene = as_plan(pruner), scene_of(processor, [image], QUESTIONS[1])
    sequence = assemble(model, scene, look(model, scene, plan), plan, positions)
    where, length = sequence.positions, sequence.embeddings.shape[1]
    where = mx.arange(length) if where is None else where
    caches = model.decoder.make_cache()
    cache = [Standing(inner, where, sequence.end) for inner in caches]
    mx.random.seed(5)
    steps = generate_step(
        mx.array([], mx.int32),
        model,
        max_tokens=8,
        sampler=make_sampler(temp),
        prompt_cache=cache,
        input_embeddings=sequence.embeddings[0],
    )
    expected = [token for token, _ in steps]
    options = {"positions": positions, "max_tokens": 8, "temp": temp, "seed": 5}
    asked = (model, processor, [image], QUESTIONS[1])
    found, _ = answer(*asked, pruner=pruner, **options)
    assert found == expected[: len(found)]


class Standing(LayerCache):
    """Cache with positions of mlx-lm's calls: all tokens but one, then one by one."""

    def __init__(self, inner, positions: mx.array, end: int):
        super().__init__(inner)
        self.prompt = positions.size
        self.positions = mx.concatenate([positions, end + mx.arange(16)])

    @property
    def offset(self) -> TokenPositions:
        read = self.inner.offset
        stop = read + 1 if read else self.prompt - 1
        return TokenPositions(self.positions[read:stop])


@pytest.mark.parametrize("step", [1, 7, 64, 77, 78])
def test_a_prompt_read_in_chunks_gives_the_same_tokens(demo, step):
    model, processor = demo
    for picture in PICTURES:
        asked = (model, processor, [picture.path], picture.question)
        whole = answer(*asked, pruner=Pruner("norm", 0.5))
        assert answer(*asked, pruner=Pruner("norm", 0.5), prefill_step_size=step) == (
            whole
        )


def test_the_prompt_goes_through_the_model_once(demo, monkeypatch):
    """Each layer reads the prompt once; the last layer answers for one token."""
    model, processor = demo
    layer, lengths = type(model.layers[0]), []
    run = layer.__call__

    def counted(self, x, *rest):
        lengths.append(x.shape[1])
        return run(self, x, *rest)

    monkeypatch.setattr(layer, "__call__", counted)
    stream = stream_generate(model, processor, [PICTURES[0].path], "Hi")
    next(stream)
    total = lengths[0]
    assert total > 64
    assert lengths == [total] * (len(model.layers) - 1) + [total - 1, 1]


def test_a_quantized_cache(demo):
    model, processor = demo
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    picture = PICTURES[0]
    asked = (model, processor, [picture.path], picture.question)
    assert generate(*asked, **options) == picture.answer
    memory = Memory()
    assert answer(*asked, memory=memory, **options)[1] == 0
    assert answer(*asked, memory=memory, **options)[1] > 0  # prefilled unquantized
    with pytest.raises(InputError, match="groups of 64 do not divide"):
        generate(*asked, kv_bits=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_bits": 3}, "cannot quantize the cache to 3 bits"),
        ({"kv_group_size": 48}, "in groups of 48"),
        (
            {"prefill_step_size": 0},
            "prefill_step_size 0 is out of range; expected one from 1",
        ),
        ({"quantized_kv_start": -1}, "quantized_kv_start -1 is out of range"),
    ],
)
def test_settings_out_of_range(tiny, settings, message):
    with pytest.raises(InputError, match=message):
        stream_generate(*tiny, [IMAGE], "Hi", **settings)


# Memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("method", ["none", "norm", "similarity"])
def test_asking_again_gives_the_same_tokens(demo, method, positions):
    model, processor = demo
    pruner = Pruner(method, keep_ratio=None if method == "none" else 0.5)
    memory = Memory()
    for number, question in enumerate(QUESTIONS):
        asked = (model, processor, [PICTURES[1].path], question)
        options = {"pruner": pruner, "positions": positions}
        expected, nothing = answer(*asked, **options)
        found, known = answer(*asked, memory=memory, **options)
        assert found == expected
        assert nothing == 0
        assert (known > pruner.count(64)) == (number > 0)


def test_what_is_recalled_gives_the_same_logits(demo):
    model, processor = demo
    image, memory = load_image(PICTURES[0].path), Memory()
    plan = as_plan(Pruner("norm", 0.5))
    for number, question in enumerate(QUESTIONS):
        scene = scene_of(processor, [image], question)
        recalled = memory.about(model, processor, [image], plan, None)
        cache = model.decoder.make_cache()
        known = recalled.fill(cache, scene.prompt, "original")
        how = {"vision": recalled.look(None), "cache": cache, "cached": known}
        read, visual = run(model, scene, plan, **how)
        length = len(scene.prompt.segments[0]) + visual.keep
        assert known == (length if number else 0)
        recalled.keep(cache, scene.prompt, "original")
        whole, _ = run(model, scene, plan)
        logits, expected = (model.decoder.logits(r.hidden) for r in (read, whole))
        assert logits.shape == expected.shape
        assert mx.max(mx.abs(logits - expected)).item() < 1e-3


def test_a_second_question_sees_and_reads_nothing_again(demo, monkeypatch):
    model, processor = demo
    memory = Memory()
    asked = (model, processor, [PICTURES[0].path])
    answer(*asked, QUESTIONS[0], memory=memory)
    looks = []
    monkeypatch.setattr(type(processor), "pixels", lambda *_: looks.append(1))
    assert answer(*asked, QUESTIONS[1], memory=memory)[1] > 64
    assert not looks


CHANGES = {
    "pixel": {},
    "method": {"pruner": Pruner("attention", keep_ratio=0.5)},
    "ratio": {"pruner": Pruner("norm", keep_ratio=0.25)},
    "seed": {"pruner": Pruner("random", keep_ratio=0.5, seed=1)},
    "positions": {"positions": "contiguous"},
    "size": {},
    "padding": {},
    "words before the picture": {},
    "vision": {},
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_anything_that_matters_is_a_miss(demo, change):
    model, processor = demo
    image, question = load_image(PICTURES[1].path), QUESTIONS[0]
    first = Pruner("random", keep_ratio=0.5) if change == "seed" else None
    options = {"pruner": first or Pruner("norm", keep_ratio=0.5)}
    memory = Memory()
    before = answer(model, processor, [image], question, memory=memory, **options)
    again = answer(model, processor, [image], question, memory=memory, **options)
    assert again[0] == before[0]
    assert again[1] > 0
    options |= CHANGES[change]
    if change == "pixel":
        image = image.copy()
        r, g, b = image.getpixel((5, 5))
        image.putpixel((5, 5), (r, g, b ^ 1))
    elif change == "size":
        processor = processor.at(256)
    elif change == "padding":
        processor = processor.at(512, "skip")
    elif change == "words before the picture":
        question = f"Look: <image> {question}"
    elif change == "vision":
        options["vision"] = Watched(options.pop("pruner"))
    expected = answer(model, processor, [image], question, **options)[0]
    found, known = answer(model, processor, [image], question, memory=memory, **options)
    assert found == expected
    assert known == 0


class Watched:
    """Stand-in of a Core ML package."""

    plan = ()

    def __init__(self, pruner: Pruner):
        self.pruner = pruner

    def check(self, model) -> None:
        pass

    def __call__(self, model, scene, plan, clock):
        return look(model, scene, as_plan(self.pruner), clock)


def test_a_memory_is_bounded_and_forgets_the_oldest(demo):
    model, processor = demo
    memory = Memory(2)
    image = load_image(PICTURES[0].path)
    pictures = [image, image.rotate(90), image.rotate(180)]
    for picture in (*pictures[:2], pictures[0], pictures[2]):
        answer(model, processor, [picture], "Hi", memory=memory, max_tokens=1)
    assert len(memory) == 2
    options = {"memory": memory, "max_tokens": 1}
    assert answer(model, processor, [pictures[0]], "Hi", **options)[1] > 0
    assert answer(model, processor, [pictures[1]], "Hi", **options)[1] == 0
    with pytest.raises(InputError, match="cannot remember 0 pictures"):
        Memory(0)


def test_another_model_empties_the_memory(demo, tiny):
    memory = Memory()
    for model, processor in (demo, tiny, demo):
        known = answer(model, processor, [IMAGE], "Hi", memory=memory, max_tokens=1)[1]
        assert known == 0
    memory.clear()
    assert answer(*demo, [IMAGE], "Hi", memory=memory, max_tokens=1)[1] == 0


def test_two_pictures_are_remembered_together(demo):
    model, processor = demo
    memory, images = Memory(), [picture.path for picture in PICTURES]
    text = "<image> is first, <image> is second. "
    for number, question in enumerate(QUESTIONS):
        asked = (model, processor, images, text + question)
        expected = answer(*asked)[0]
        found, known = answer(*asked, memory=memory)
        assert found == expected
        assert (known > 128) == (number > 0)
    swapped = (model, processor, images[::-1], text + QUESTIONS[0])
    assert answer(*swapped, memory=memory)[1] == 0


def test_an_answer_does_not_change_what_is_remembered(demo):
    """Repeated answers from a memory are equal, though caches are written."""
    model, processor = demo
    memory = Memory()
    asked = (model, processor, [PICTURES[0].path], QUESTIONS[1])
    expected = answer(*asked)[0]
    for _ in range(3):
        assert answer(*asked, memory=memory)[0] == expected


def test_a_memory_holds_no_more_than_the_opening(demo):
    model, processor = demo
    held = []
    for question in ("Hi", "Which of these words is it? " * 100):
        memory = Memory()
        answer(model, processor, [PICTURES[0].path], question, memory=memory, temp=0.0)
        picture = next(iter(memory._pictures.values()))
        before = mx.get_active_memory()
        picture.layers = ()
        held.append(before - mx.get_active_memory())
    assert 0 < held[1] < 1.1 * held[0]


def test_vision_and_a_pruner_exclude_each_other(demo):
    pruner = Pruner("norm", keep_ratio=0.5)
    with pytest.raises(InputError, match="pass the pruner to `vision`"):
        generate(*demo, [PICTURES[0].path], "Hi", vision=Watched(pruner), pruner=pruner)


def test_the_command_asks_several_questions(capsys):
    command(["--json", "--prompt", QUESTIONS[0], "--prompt", PICTURES[0].question])
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert [record["reused_tokens"] > 0 for record in records] == [False, True]
    assert records[1]["text"] == PICTURES[0].answer


# Budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 448, 256, 64])
def test_the_largest_size_that_fits(demo, monkeypatch, size):
    """The largest size within the time is found from two measured sizes."""
    model, processor = demo
    runs = []

    def measured(model, processor, *_):
        runs.append(processor.image_size)
        return 25 + 50 * (processor.image_size / 256) ** 2

    monkeypatch.setattr(sizes, "_measure", measured)
    asked = (model, processor, [], "Hi", (), "original")
    expected = 25 + 50 * (size / 256) ** 2
    fit = sizes.fit_image_size(*asked, expected + 0.1)
    assert fit.image_size == size
    assert fit.predicted_ms == pytest.approx(expected)
    assert runs == [256, 512]


def test_the_second_of_two_runs_is_measured(demo, monkeypatch):
    """The measured time is that of the second run, after a warm-up."""
    model, processor = demo
    spent, images = [100.0, 5.0], [load_image(PICTURES[0].path)]

    class Told(NoClock):
        def __init__(self):
            self.times = {}

        def stage(self, name):
            self.times = self.times or {"all": spent.pop(0)}
            return super().stage(name)

    monkeypatch.setattr(sizes, "Clock", Told)
    assert sizes._measure(model, processor, images, "Hi", (), "original") == 5
    assert not spent


def test_a_budget_leaves_room_for_the_tokens_to_keep(demo, monkeypatch):
    model, processor = demo
    monkeypatch.setattr(sizes, "_measure", lambda *_: 5.0)
    image = load_image(PICTURES[0].path).resize((300, 300))
    plan = as_plan(Pruner("norm", keep_tokens=40))
    asked = (model, processor, [image], "Hi", plan, "original")
    assert sizes.fit_image_size(*asked, 1e6).image_size == 512
    with pytest.raises(InputError, match="the smallest, 448 px, takes about 5 ms"):
        sizes.fit_image_size(*asked, 1)


@pytest.mark.parametrize("extra", [["--temporal"], ["--vision-budget", "9"]])
def test_a_command_without_a_picture(capsys, extra):
    with pytest.raises(SystemExit) as stopped:
        command(["--model", str(TINY), "--prompt", "a", *extra])
    assert stopped.value.code == 2
    assert "no picture was given; say --image FILE" in capsys.readouterr().err
