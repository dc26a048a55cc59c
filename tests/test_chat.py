"""Chats: later questions read the kept cache and answer as if all were read anew."""

import contextlib
import dataclasses
import io
import itertools
import sys

import mlx.core as mx
import pytest
from asking import IMAGE, QUESTIONS, answer
from conftest import TINY

from mlx_tokprune import Chat, Pruner, Selection
from mlx_tokprune import __main__ as program
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.errors import InputError
from mlx_tokprune.generate.drafts import ModelDrafts, NgramDrafts, SelfDrafts
from mlx_tokprune.models.language import greedy
from mlx_tokprune.pipeline import Scene, run
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.processor import Processor
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import as_plan
from mlx_tokprune.pruners.registry import temporary

TURNS = ("What is it?", "Where?", "Which of them is the largest, and why?")


def ids_of(processor, turns, answers) -> Prompt:
    """Return the token ids of a whole conversation, from its text and answers."""
    ends = processor.tokenizer.eos_token_ids
    first, last = processor.prompt(turns[0], 1).segments
    for answer_ids, turn in zip(answers, turns[1:], strict=True):
        kept = [token for token in answer_ids if token not in ends]
        text = (
            f"<|im_end|>\n<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
        last = (*last, *kept, *ids)
    return Prompt((first, last))


def anew(model, processor, image, prompt, plan, positions, count) -> list[int]:
    """Return greedy tokens behind a prompt; all of it is read for each token."""
    pixels, found = mx.array(processor.pixels([image])), []
    for _ in range(count):
        after = mx.array([found], mx.int32) if found else None
        scene = Scene(pixels, prompt)
        read, _ = run(model, scene, plan, positions=positions, after=after)
        token = greedy(model.decoder.logits(read.hidden)[:, -1])[0].item()
        found.append(token)
        if token in processor.tokenizer.eos_token_ids:
            break
    return found


@contextlib.contextmanager
def chosen_again(visual):
    """Yield pruners that choose what a plan chose, whatever the question is."""
    with contextlib.ExitStack() as stack:
        pruners = []
        for number, (place, kept) in enumerate(visual.choices):
            register = stack.enter_context(temporary(f"again{number}"))
            register(lambda features, *, keep, kept=kept: Selection(kept))
            pruners.append(Pruner(f"again{number}", None, kept.shape[1], at=place))
        yield tuple(pruners)


PRUNERS = {
    "all": None,
    "tower": Pruner("norm", 0.25),
    "merged": Pruner("visionzip", 0.25),
    "question": Pruner("cdpruner", 0.25),
    "layer": Pruner("fastv", 0.5, at=1),
    "plan": [Pruner("norm", 0.5), Pruner("attention", 0.5, at=2)],
}


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("name", PRUNERS)
def test_later_answers_are_those_of_the_whole_conversation(tiny, name, positions):
    model, processor = tiny
    chat = Chat(*tiny, [IMAGE], pruner=PRUNERS[name], positions=positions, max_tokens=7)
    answers, image = [], load_image(IMAGE)
    for number, turn in enumerate(TURNS):
        last = chat.ask(turn)
        prompt = ids_of(processor, TURNS[: number + 1], answers)
        plan = contextlib.nullcontext(as_plan(PRUNERS[name]))
        if name in ("question", "layer", "plan"):  # by the first question alone
            plan = chosen_again(chat._kept.visual)
        with plan as pruners:
            arguments = (model, processor, image, prompt, pruners, positions)
            assert last.token_ids == anew(*arguments, 7), number
        assert (last.last.reused > 0) == (number > 0)
        answers.append(last.token_ids)


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("stop", [(), ("e", "1")])
def test_what_ends_an_answer_is_read_once(demo, positions, stop):
    """An end token, and tokens of a stop text, are not in the cache twice."""
    model, processor = demo
    picture, pruner = PICTURES[1], Pruner("norm", 0.5)
    options = {"pruner": pruner, "positions": positions, "stop": stop}
    chat, image = Chat(*demo, [picture.path], **options), load_image(picture.path)
    prompt, ends = None, processor.tokenizer.eos_token_ids
    for number, turn in enumerate((picture.question, *QUESTIONS)):
        *first, last = (prompt or processor.prompt(turn, 1)).segments
        last = (*last, *(processor.continued(turn) if number else ()))
        found = chat.ask(turn)
        arguments = (model, processor, image, Prompt((*first, last)), as_plan(pruner))
        ids = anew(*arguments, positions, len(found.token_ids))
        assert found.token_ids == ids
        assert stop or ids[-1] in ends
        prompt = chat._kept.prompt
        held = chat._kept.cache[0].inner.offset + len(chat._kept.pending)
        assert held == len(prompt.ids()) + pruner.count(64)
        whole = processor.tokenizer.decode(prompt.segments[1][len(last) :])
        assert whole == found.text


@pytest.mark.parametrize("kind", ["ngram", "self", "model"])
def test_drafts_do_not_change_a_chat(tiny, kind):
    draft = {"ngram": NgramDrafts(), "self": SelfDrafts()}.get(kind)
    draft = draft or ModelDrafts(*tiny, pruner=Pruner("norm", 0.25))
    plain, drafted = (
        Chat(*tiny, [IMAGE], pruner=Pruner("norm", 0.5), max_tokens=12, draft=one)
        for one in (None, draft)
    )
    for turn in TURNS:
        one, other = plain.ask(turn), drafted.ask(turn)
        assert one.token_ids == other.token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 0.2, "repetition_context_size": 100},
        {"temp": 1.5, "seed": 4, "top_k": 5},
        {"prefill_step_size": 3},
        {"system_prompt": "Be brief."},
    ],
)
def test_settings_hold_in_later_turns(tiny, settings):
    """A later answer equals that to one prompt with the token ids of all turns."""
    model, processor = tiny
    chat = Chat(*tiny, [IMAGE], max_tokens=6, **settings)
    first = chat.ask(TURNS[0])
    second = chat.ask(TURNS[1])
    if "system_prompt" in settings:
        processor = processor.with_system(settings.pop("system_prompt"))
    prompt = ids_of(processor, TURNS[:2], [first.token_ids])
    fields = {f.name: getattr(processor, f.name) for f in dataclasses.fields(processor)}
    fixed = type("Fixed", (Processor,), {"prompt": lambda *_: prompt})(**fields)
    found, _ = answer(model, fixed, [IMAGE], "all turns", max_tokens=6, **settings)
    assert second.token_ids == found


def test_the_picture_is_encoded_once(demo, monkeypatch):
    model, _ = demo
    chat, encoded = Chat(*demo, [PICTURES[0].path], pruner=Pruner("norm", 0.5)), []
    encode = type(model).encode

    def counted(self, *arguments, **named):
        encoded.append(1)
        return encode(self, *arguments, **named)

    monkeypatch.setattr(type(model), "encode", counted)
    assert chat.ask(PICTURES[0].question).text == PICTURES[0].answer
    for question in QUESTIONS:
        chat.ask(question)
    assert len(encoded) == 1
    chat.reset()
    assert chat.ask(PICTURES[0].question).text == PICTURES[0].answer
    chat.reset([PICTURES[1].path])
    assert chat.ask(PICTURES[1].question).text == PICTURES[1].answer
    assert len(encoded) == 3


def test_a_stream_that_is_stopped_early_is_kept_so_far(tiny):
    _, processor = tiny
    chat, other = (Chat(*tiny, [IMAGE], max_tokens=9) for _ in range(2))
    stream = chat.stream(TURNS[0])
    ids = [next(stream).token for _ in range(3)]
    with pytest.raises(InputError, match="an answer is being streamed"):
        chat.ask(TURNS[1])
    stream.close()
    assert chat._kept.prompt.ids() == [*processor.prompt(TURNS[0], 1).ids(), *ids]
    short = Chat(*tiny, [IMAGE], max_tokens=3)
    assert short.ask(TURNS[0]).token_ids == ids
    short._settings["max_tokens"] = 9
    assert chat.ask(TURNS[1]).token_ids == short.ask(TURNS[1]).token_ids
    assert other.ask(TURNS[0]).token_ids[:3] == ids


def test_a_stop_text_is_not_part_of_the_conversation(demo):
    asked = ([PICTURES[0].path],)
    chat = Chat(*demo, *asked, stop="S")
    assert chat.ask(PICTURES[0].question).text == "EA"
    tokenizer = demo[1].tokenizer
    ids = demo[1].prompt(PICTURES[0].question, 1).ids()
    ids += tokenizer.encode("EA", add_special_tokens=False)
    assert chat._kept.prompt.ids() == ids
    held = chat._kept.cache[0].inner.offset + len(chat._kept.pending)
    assert held == len(ids) + 64
    chat.ask("Why?")


def test_a_question_that_is_refused_changes_nothing(tiny):
    chat, other = (Chat(*tiny, [IMAGE], max_tokens=5) for _ in range(2))
    with pytest.raises(InputError, match="empty"):
        chat.ask("")
    for question in TURNS[:2]:
        assert chat.ask(question).token_ids == other.ask(question).token_ids
        for wrong, message in (
            ("", "empty"),
            (" ", "empty"),
            (7, "the prompt is a text"),
            ("<image> What?", "pictures stand in the first question"),
            ("\udcff", "not valid Unicode"),
            ("x " * 2500, "does not fit"),
            ("x" * 10**6, "too long"),
        ):
            with pytest.raises(InputError, match=message):
                chat.ask(wrong)
    assert chat.ask(TURNS[2]).token_ids == other.ask(TURNS[2]).token_ids


def test_an_error_while_reading_leaves_the_conversation(tiny, monkeypatch):
    chat, other = (Chat(*tiny, [IMAGE], max_tokens=5) for _ in range(2))
    for one in (chat, other):
        one.ask(TURNS[0])
    decoder = chat._model.decoder
    follow = decoder.follow

    def broken(ids, cache):
        follow(ids, cache[:2] + cache[2:])
        raise RuntimeError("no memory")

    monkeypatch.setattr(decoder, "follow", broken)
    with pytest.raises(RuntimeError):
        chat.ask(TURNS[1])
    monkeypatch.undo()
    assert chat.ask(TURNS[1]).token_ids == other.ask(TURNS[1]).token_ids


def test_the_cache_size_bounds_the_conversation(tiny):
    _, processor = tiny
    prompt = len(processor.prompt(TURNS[0], 1).ids()) + 64
    chat = Chat(*tiny, [IMAGE], max_tokens=9, max_kv_size=prompt + 4)
    first = chat.ask(TURNS[0])
    assert len(first.token_ids) == 4
    assert first.last.finish_reason == "length"
    with pytest.raises(InputError, match="but max_kv_size is"):
        chat.ask(TURNS[1])
    with pytest.raises(InputError, match="the conversation has"):
        Chat(*tiny, [IMAGE], max_kv_size=prompt).ask(TURNS[0])


def test_the_first_question_prunes_is_said_once(tiny, caplog):
    from mlx_tokprune.errors import note

    note.cache_clear()
    chat = Chat(*tiny, [IMAGE], pruner=PRUNERS["question"], max_tokens=2)
    for turn in TURNS:
        chat.ask(turn)
    said = [m for m in caplog.messages if "first question" in m]
    assert len(said) == 1
    note.cache_clear()
    caplog.clear()
    chat = Chat(*tiny, [IMAGE], pruner=PRUNERS["tower"], max_tokens=2)
    for turn in TURNS:
        chat.ask(turn)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "no picture was given"),
        ({"images": ["nowhere.png"]}, "does not exist"),
        ({"temp": -1}, "out of range"),
        ({"draft": SelfDrafts(), "kv_bits": 8}, "without kv_bits"),
        ({"unknown": 1}, "unexpected keyword"),
    ],
)
def test_bad_arguments(tiny, arguments, message):
    options = {"images": [IMAGE]} | arguments
    with pytest.raises((InputError, TypeError), match=message):
        Chat(*tiny, **options)


def test_a_policy_cannot_chat(tiny_policy):
    with pytest.raises(InputError, match="answers in actions"):
        Chat(*tiny_policy, [TINY / "image_0.png"])


def test_a_quantized_cache_in_a_chat(demo):
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    chat = Chat(*demo, [PICTURES[0].path], **options)
    assert chat.ask(PICTURES[0].question).text == PICTURES[0].answer
    assert chat.ask(QUESTIONS[1]).last.reused > 64


# Command line -----------------------------------------------------------------------


def chat_of(monkeypatch, capsys, lines: str | bytes, *flags: str) -> str:
    data = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    program.main(["chat", *flags])
    return capsys.readouterr().out


def test_a_chat_on_the_command_line(monkeypatch, capsys, tmp_path):
    one, other = PICTURES
    spaced = tmp_path / "my picture.png"
    spaced.write_bytes(other.path.read_bytes())
    lines = f"{one.question}\n\n{QUESTIONS[1]}\nh\nr\n{one.question}\n"
    lines += f"/image {spaced}\n{other.question}\n/image '{one.path}' {other.path}\n"
    lines += f"What?\n/clear\nWhat?\n/help\n/image {one.path.as_uri()}\nWhat?\n/exit\nx"
    out = chat_of(monkeypatch, capsys, lines).splitlines()
    answers = [text for text, after in itertools.pairwise(out) if "(TTFT" in after]
    assert [answers[i] for i in (0, 2, 3)] == [one.answer, one.answer, other.answer]
    assert len(answers) == 7
    reused = ["reused" in line for line in out if "(TTFT" in line]
    assert reused == [False, True, False, False, False, False, False]
    assert sum("commands: q quits" in line for line in out) == 3


def test_flags_of_a_chat(monkeypatch, capsys, tiny):
    flags = ["--model", str(TINY), "--image", str(IMAGE), "--keep-ratio", "0.5"]
    flags += ["--max-tokens", "4", "--temperature", "2", "--top-k", "9", "--seed", "5"]
    flags += ["--system", "Hm.", "--draft"]
    with pytest.raises(SystemExit):
        chat_of(monkeypatch, capsys, "What?\nq\n", *flags)
    assert "a draft samples by temp and top_p alone" in capsys.readouterr().err
    options = {"max_tokens": 4, "temp": 2.0, "top_k": 9, "seed": 5}
    pruner = Pruner("norm", 0.5)
    chat = Chat(*tiny, [IMAGE], pruner=pruner, system_prompt="Hm.", **options)
    expected = [chat.ask(text).text for text in TURNS]
    out = chat_of(monkeypatch, capsys, "\n".join(TURNS), *flags[:-1])
    for text in expected:
        assert text in out


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ("hi", ["--model", str(TINY)], "there is no picture yet; say /image FILE"),
        ("r", ["--model", str(TINY)], "there is no picture yet"),
        ("/image nowhere.png", [], "'nowhere.png' does not exist"),
        ("/image", [], "/image needs the name of a picture"),
        ("/image 'a", [], "No closing quotation"),
        ("/image -", [], "standard input has the questions"),
        ("/photo a.png", [], "unknown command /photo"),
        ("<image>?\nAnd <image>?", [], "pictures stand in the first question"),
        (b"\xff\xfe\n", [], "no UTF-8 text"),
        ("hi", ["--image", "-"], "standard input has the questions"),
        ("hi", ["--image-size", "100"], "cannot encode pictures of 100 px"),
        ("hi", ["--model", "demo-policy"], "answers in actions"),
        ("hi", ["--top-k", "-1"], "top_k -1 is out of range"),
    ],
)
def test_bad_lines_are_one_sentence(monkeypatch, capsys, lines, flags, message):
    with pytest.raises(SystemExit) as stop:
        chat_of(monkeypatch, capsys, lines, *flags)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_at_a_terminal_a_bad_line_does_not_end_the_chat(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    one = PICTURES[0]
    monkeypatch.setattr(sys, "stdin", Terminal(f"/foo\n/image x\n{one.question}\nq\n"))
    program.main(["chat"])
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 2
    assert one.answer in captured.out
