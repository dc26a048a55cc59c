"""Group 11: odd lines and flags of chats, and answers behind a kept cache."""

import dataclasses
import io
import sys
from functools import cache
from pathlib import Path
from random import Random
from unittest import mock

from . import flags
from .asks import PICTURES, TINY, right
from .case import Outcome, Place, flags_of, perform

QUESTIONS = ("What?", "Who is it?", "x", "What colour is the thing in the middle?")
ODD = (
    *(
        "",
        " ",
        "q",
        "r",
        "h",
        "/exit",
        "/clear",
        "/help",
        "/image",
        "/image nowhere.png",
    ),
    *("/image -", "/image '", '/image "a b"', "/image /dev/null", "/image ~", "/photo"),
    *(
        "/image http://127.0.0.1:1/x",
        "/image data:,",
        "/",
        "/image\t",
        "<image>",
        "Q q",
    ),
    *(
        "<|im_end|>",
        "a <image> b <image>",
        "word " * 5000,
        "x" * 10**5,
        "\x1b[2J",
        "\0",
    ),
    *("\udcff", "é\u202e", "\U0001f600", "/image " + "a" * 9000, "/q", "hello\rworld"),
)
METHODS = ("none", "norm", "attention", "similarity", "visionzip", "prumerge", "dart")
POSITIONS = ("original", "contiguous")


def run(rng: Random, place: Place) -> Outcome:
    if rng.random() < 0.3:
        return _same_as_anew(rng)
    lines = [rng.choice(rng.choice((ODD, QUESTIONS))) for _ in range(rng.randrange(6))]
    if rng.random() < 0.3:
        lines.insert(0, f"/image {PICTURES[TINY]} {TINY / 'image_0.png'}")
    data = "\n".join(lines).encode(errors="surrogateescape")
    data += rng.choice((b"", b"\n", b"\xff\n", b"\nq\n"))
    more, actions = [], flags_of("chat")
    for action in rng.sample(actions, rng.choice((0, 0, 1, 2))):
        more += flags._spoken(rng, action)
    if rng.random() < 0.3:
        more += ["--prune", rng.choice(("norm:0.5", "cdpruner:0.5", "fastv:0.5@1"))]
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data))):
        outcome = perform("chat", [*right("chat", place), *more], place)
    return Outcome(outcome.kind, f"{outcome.told}\n  lines {data[:300]!r}")


@cache
def _loaded() -> tuple:
    from mlx_tokprune import load

    return load(TINY)


def _same_as_anew(rng: Random) -> Outcome:
    """Compare a chat's answers to those of a prompt with all its token ids."""
    from mlx_tokprune import Chat, Pruner, stream_generate
    from mlx_tokprune.processing.processor import Processor
    from mlx_tokprune.processing.prompt import Prompt

    (model, processor), method = _loaded(), rng.choice(METHODS)
    ratio = None if method == "none" else rng.choice((0.1, 0.25, 0.6))
    options = {"pruner": Pruner(method, ratio), "positions": rng.choice(POSITIONS)}
    options["max_tokens"] = rng.choice((1, 2, 9))
    options["prefill_step_size"] = rng.choice((1, 7, 2048))
    if rng.random() < 0.4:
        options |= {"repetition_penalty": rng.choice((0.1, 3.0)), "stop": ["e", "a"]}
    images = [Path(PICTURES[TINY])] * rng.choice((1, 1, 2))
    chat, before = Chat(model, processor, images, **options), None
    fields = {f.name: getattr(processor, f.name) for f in dataclasses.fields(processor)}
    for number in range(3):
        question = rng.choice(QUESTIONS)
        if number:
            *first, last = before.segments
            before = Prompt((*first, (*last, *processor.continued(question))))
        else:
            before = processor.prompt(question, len(images))
        fixed = type("Fixed", (Processor,), {"prompt": lambda *_, p=before: p})(
            **fields
        )
        pieces = stream_generate(model, fixed, images, "all turns", **options)
        expected = [piece.token for piece in pieces]
        answer = chat.ask(question)
        if answer.token_ids != expected:
            told = f"turn {number}: {answer.token_ids} is not {expected}, {options}"
            return Outcome("wrong", told)
        before = chat._kept.prompt
    return Outcome("succeeded")
