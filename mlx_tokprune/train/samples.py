"""Training data: questions and answers about pictures, read or generated."""

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
from ..features import HasParameters
from ..files import note_shadowed, read_lines
from ..processing.image import load_image
from ..scenes.held_out import TRAINING
from ..scenes.pictures import CANVAS, Scene, render, sample_scene
from ..scenes.questions import ask_many
from .loop import check_same

MOST_LINES = 1 << 22
_DEMO_SEED = (TRAINING, 777)  # differs from other trainings and held-out pictures
_DEMO_QUESTIONS = 8  # for each picture


@dataclass(frozen=True)
class Sample:
    """Picture with its pairs of question and answer.

    picture: path of a file, or a key that identifies a generated picture. draw: draws
    the generated picture; `None` for a file.
    """

    picture: Hashable
    pairs: tuple[tuple[str, str], ...]
    draw: Callable[[], Image.Image] | None = field(
        default=None, repr=False, compare=False
    )

    def load(self) -> Image.Image:
        """Return the picture, drawn or read from its file."""
        return self.draw() if self.draw else load_image(str(self.picture))


@dataclass(frozen=True)
class Samples:
    """Samples of a data set, one for each picture, with the entries skipped in it.

    skipped: (number of the line or entry, reason).
    """

    items: tuple[Sample, ...]
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def digest(self) -> str:
        """Hash of all questions, answers and picture files, as hex digits."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            digest.update(repr((item.picture, item.pairs)).encode())
            if item.draw is None:
                digest.update(Path(str(item.picture)).read_bytes())
        return digest.hexdigest()


def check_started(
    folder: Path, model: HasParameters, samples: Samples, settings: dict
) -> None:
    """Write the settings of a training to `folder`, or compare them.

    Raises `InputError` where the folder holds a training with another model, other
    samples or other settings, or files that are not of a training.
    """
    file = folder / "settings.json"
    if folder.is_dir() and any(folder.iterdir()) and not file.exists():
        raise InputError(
            f"{folder} has files, and none of a training; choose a new folder"
        )
    identity = {**settings, "model": fingerprint(model), "data": samples.digest}
    processes = mx.distributed.init().size()  # each draws a batch
    identity |= {"processes": processes} if processes > 1 else {}
    check_same(file, identity)


def read_samples(source: str, pictures: int) -> Samples:
    """Read JSON lines or LLaVA's JSON, or generate `demo` samples.

    Lines are objects with `image`, `question` and `answer`; LLaVA's file is a list of
    objects with `image` and `conversations`, each turn of which is one pair. Paths are
    relative to the file. pictures: number of generated pictures. A bad line is skipped
    and named in `skipped`. Raises `InputError` where no sample is left.
    """
    if source == "demo":
        note_shadowed(source)
        return Samples(tuple(_demo(pictures)))
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"{source!r} does not exist; expected `demo`, JSON lines of image, "
            "question and answer, or a JSON list of LLaVA's conversations"
        )
    by_picture: dict[str, list[tuple[str, str]]] = {}
    skipped = []
    for number, entry in _entries(path):
        try:
            picture, pairs = _parsed(entry, path.parent)
        except (ValueError, InputError) as error:
            skipped.append((number, str(error)))
            continue
        by_picture.setdefault(picture, []).extend(pairs)
    if not by_picture:
        reasons = "; ".join(f"line {n}: {why}" for n, why in skipped[:3])
        raise InputError(f"{source} has nothing to learn from ({reasons or 'empty'})")
    items = (Sample(picture, tuple(pairs)) for picture, pairs in by_picture.items())
    return Samples(tuple(items), tuple(skipped))


def _entries(path: Path) -> list[tuple[int, Any]]:
    """Return the lines, or the entries of one JSON list, with numbers from 1."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if text.lstrip().startswith("["):
        try:
            return list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError):
            raise InputError(
                f"{path} begins as a JSON list, but is not valid JSON"
            ) from None
    return read_lines(text)[:MOST_LINES]


def _parsed(entry: Any, folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return the picture's path and the pairs; raise `ValueError` for a bad entry."""
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError):
            raise ValueError("is not valid JSON") from None
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
        raise ValueError("conversations is not a list of objects")
    for human, gpt in zip(turns[::2], turns[1::2], strict=False):
        question, answer = human.get("value"), gpt.get("value")
        if human.get("from") != "human" or gpt.get("from") != "gpt":
            raise ValueError("conversations do not alternate between human and gpt")
        if isinstance(question, str) and isinstance(answer, str) and answer:
            yield question.replace("<image>", "").strip(), answer


def _answer(entry: dict) -> str:
    """Return the most frequent answer: `evaluate` takes several people's answers."""
    answers = entry.get("answer", entry.get("answers"))
    answers = answers if isinstance(answers, list) else [answers]
    if any(isinstance(a, bool) or not isinstance(a, (str, int)) for a in answers):
        return ""
    return str(max(answers, key=answers.count)) if answers else ""


def _demo(pictures: int) -> Iterator[Sample]:
    for number in range(pictures):
        rng = np.random.default_rng((*_DEMO_SEED, number))
        scene = sample_scene(rng, CANVAS, 5)
        questions = ask_many(rng, scene, _DEMO_QUESTIONS)
        pairs = tuple((question.prompt, question.answer) for question in questions)
        yield Sample(("demo", number), pairs, functools.partial(_draw, number, scene))


def _draw(number: int, scene: Scene) -> Image.Image:
    """Draw the picture of a scene; repeated calls return equal pictures."""
    return render(np.random.default_rng((*_DEMO_SEED, number, 1)), scene)
