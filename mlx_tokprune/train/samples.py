"""What is learned from: questions and answers about pictures, read or generated."""

import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.fingerprint import fingerprint
from ..errors import InputError
from ..files import read_lines
from ..processing.image import load_image
from ..scenes import testbed
from ..scenes.held_out import TRAINING
from ..scenes.pictures import CANVAS, Scene, render, sample_scene
from ..scenes.questions import ask_many
from .loop import check_same

MOST_LINES = 1 << 22
_DEMO_SEED = (TRAINING, 777)  # no other training's, and none of the held-out pictures'
_DEMO_QUESTIONS = 8  # about each picture


@dataclass(frozen=True)
class Sample:
    """A picture, by what tells it from others, and what is asked about it.

    draw: makes the picture, where it is no file.
    """

    picture: Hashable
    pairs: tuple[tuple[str, str], ...]
    draw: Callable[[], Image.Image] | None = field(
        default=None, repr=False, compare=False
    )

    def load(self) -> Image.Image:
        return self.draw() if self.draw else load_image(str(self.picture))


@dataclass(frozen=True)
class Samples:
    """One for each picture, and what was skipped: (line or entry, reason)."""

    items: tuple[Sample, ...]
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def digest(self) -> str:
        """What tells these questions, and files of pictures, from others."""
        found = hashlib.blake2b(digest_size=16)
        for item in self.items:
            found.update(repr((item.picture, item.pairs)).encode())
            if item.draw is None:
                found.update(Path(str(item.picture)).read_bytes())
        return found.hexdigest()


def check_started(folder: Path, model, samples: Samples, settings: dict) -> None:
    """A folder is gone on from with the same model, questions and settings only."""
    known = {**settings, "model": fingerprint(model), "data": samples.digest}
    processes = mx.distributed.init().size()  # each draws a batch
    known |= {"processes": processes} if processes > 1 else {}
    check_same(folder / "settings.json", known)


def read_samples(source: str, pictures: int) -> Samples:
    """`demo` or `testbed` (`pictures` generated), JSON lines, or LLaVA's conversations.

    Lines are objects with `image`, `question` and `answer`; LLaVA's file is a list of
    objects with `image` and `conversations`, of which each turn is learned by itself.
    Paths are relative to the file. A bad line is skipped and named. Raises `InputError`
    where nothing is left.
    """
    if source in ("demo", "testbed"):
        make = _demo if source == "demo" else _testbed
        return Samples(tuple(make(pictures)))
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"{source!r} does not exist; expected `demo`, JSON lines of image, "
            "question and answer, or a JSON list of LLaVA's conversations"
        )
    found: dict[str, list[tuple[str, str]]] = {}
    skipped = []
    for number, entry in _entries(path):
        try:
            picture, pairs = _parsed(entry, path.parent)
        except (ValueError, InputError) as error:
            skipped.append((number, str(error)))
            continue
        found.setdefault(picture, []).extend(pairs)
    if not found:
        reasons = "; ".join(f"line {n}: {why}" for n, why in skipped[:3])
        raise InputError(f"{source} has nothing to learn from ({reasons or 'empty'})")
    items = tuple(Sample(picture, tuple(pairs)) for picture, pairs in found.items())
    return Samples(items, tuple(skipped))


def _entries(path: Path) -> list[tuple[int, Any]]:
    """Lines, or the entries of one JSON list, and their numbers."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError):
            raise InputError(f"{path} begins as a JSON list, but is none") from None
    return read_lines(text)[:MOST_LINES]


def _parsed(entry, folder: Path) -> tuple[str, list[tuple[str, str]]]:
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError):
            raise ValueError("is no JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise ValueError("has no image")
    pairs = list(_pairs(entry))
    if not pairs:
        raise ValueError("has no question with an answer")
    picture = folder / entry["image"]
    load_image(str(picture))
    return str(picture), pairs


def _pairs(entry: dict) -> Iterator[tuple[str, str]]:
    turns = entry.get("conversations")
    if turns is None:
        question, answer = entry.get("question"), _answer(entry)
        if isinstance(question, str) and question.strip() and answer:
            yield question, answer
        return
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise ValueError("conversations is no list of objects")
    for asked, said in zip(turns[::2], turns[1::2], strict=False):
        question, answer = asked.get("value"), said.get("value")
        if asked.get("from") != "human" or said.get("from") != "gpt":
            raise ValueError("turns are not human and gpt in turn")
        if isinstance(question, str) and isinstance(answer, str) and answer:
            yield question.replace("<image>", "").strip(), answer


def _answer(entry: dict) -> str:
    """Of several people's answers, as `evaluate` takes them, the commonest."""
    answers = entry.get("answer", entry.get("answers"))
    answers = answers if isinstance(answers, list) else [answers]
    if any(isinstance(a, bool) or not isinstance(a, (str, int)) for a in answers):
        return ""
    return str(max(answers, key=answers.count)) if answers else ""


def _demo(pictures: int) -> Iterator[Sample]:
    for number in range(pictures):
        rng = np.random.default_rng((*_DEMO_SEED, number))
        scene = sample_scene(rng, CANVAS, 5)
        asked = ask_many(rng, scene, _DEMO_QUESTIONS)
        pairs = tuple((question.prompt, question.answer) for question in asked)
        yield Sample(("demo", number), pairs, functools.partial(_draw, number, scene))


def _testbed(pictures: int) -> Iterator[Sample]:
    """Things and backgrounds of the training; drawn when they are asked for."""
    testbed.stock("train")
    for number in range(pictures):
        rng = np.random.default_rng((*_DEMO_SEED, number, 2))
        scene = testbed.sample_scene(rng, "train")
        asked = [*testbed.ask(rng, scene), *testbed.ask(rng, scene)]
        pairs = tuple(dict.fromkeys((one.prompt, one.answer) for one in asked))
        yield Sample(("testbed", number), pairs, scene.draw)


def _draw(number: int, scene: Scene) -> Image.Image:
    """The same picture whenever it is asked for."""
    return render(np.random.default_rng((*_DEMO_SEED, number, 1)), scene)
