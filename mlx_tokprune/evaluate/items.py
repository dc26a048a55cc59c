"""Questions about pictures: from JSON lines, a folder, or generated pictures."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..files import note_shadowed, read_lines
from ..processing.image import list_pictures, load_image

DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Item:
    """Question about one picture.

    picture: file, or another name that is unique. answers: the right ones, empty if
    unknown. image, draw: the picture or its source, if it is no file. needed: the
    visual tokens that show the answer, by their number in the unpruned picture, empty
    if unknown. line: line number in the data, from 1.
    """

    picture: str
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    image: Image.Image | None = field(default=None, repr=False, compare=False)
    needed: tuple[int, ...] = ()
    draw: Callable[[], Image.Image] | None = field(
        default=None, repr=False, compare=False
    )
    line: int = field(default=0, repr=False, compare=False)

    @property
    def is_file(self) -> bool:
        """True if the picture is a file."""
        return self.image is None and self.draw is None

    def load(self) -> Image.Image:
        """Return the picture; `InputError` for a file that cannot be read."""
        if self.draw is not None:
            return self.draw()
        return self.image or load_image(self.picture)


@dataclass(frozen=True)
class Questions:
    """Questions of a source, and its skipped lines as (line number, reason)."""

    items: tuple[Item, ...]
    skipped: tuple[tuple[int, str], ...] = ()


def read_questions(source: str, pictures: int, prompt: str | None) -> Questions:
    """Read `demo`, a JSONL file, or a folder of pictures.

    pictures: number of pictures of `demo`. prompt: question about each picture of a
    folder. Raises `InputError` for an unknown source or one without questions.
    """
    path = Path(source)
    if source == "demo":
        note_shadowed(source)
        questions = Questions(tuple(_demo(pictures)))
    elif path.is_dir():
        questions = _folder(path, prompt or DESCRIBE)
    elif path.is_file():
        questions = _lines(path)
    else:
        raise InputError(
            f"{source!r} does not exist; expected `demo`, a folder of pictures, or a "
            "file with a line of JSON for each question"
        )
    if not questions.items:
        skipped = questions.skipped[:3]
        reasons = "; ".join(f"line {number}: {reason}" for number, reason in skipped)
        raise InputError(
            f"{source} has no question that can be asked"
            + (f" ({reasons})" if reasons else "")
        )
    return questions


def blinded(questions: Questions) -> Questions:
    """Return the questions with black pictures of the same sizes, renamed."""

    def black(item: Item) -> Item:
        def draw() -> Image.Image:
            return Image.new("RGB", item.load().size)

        name = f"{item.picture}, black"  # its own run: a journal tells it apart
        return replace(item, picture=name, image=None, draw=draw)

    return replace(questions, items=tuple(map(black, questions.items)))


def _folder(folder: Path, prompt: str) -> Questions:
    files, items, skipped = list_pictures(folder), [], []
    for number, file in enumerate(files, 1):
        try:
            load_image(file)
        except InputError as error:
            skipped.append((number, str(error)))
        else:
            items.append(Item(str(file), prompt, line=number))
    return Questions(tuple(items), tuple(skipped))


def _lines(file: Path) -> Questions:
    items: dict[tuple, Item] = {}
    skipped, first = [], {}
    try:
        lines = read_lines(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        raise InputError(f"{file} is no UTF-8 text; expected lines of JSON") from None
    for number, line in lines:
        try:
            item = _item(line, file.parent)
        except InputError as error:
            skipped.append((number, str(error)))
            continue
        key = (item.picture, item.question)
        if key in items:
            skipped.append((number, f"repeats the question of line {first[key]}"))
            continue
        items[key], first[key] = replace(item, line=number), number
    # Questions about one picture together, so that it is encoded once.
    order = {picture: i for i, (picture, _) in reversed(list(enumerate(items)))}
    return Questions(
        tuple(sorted(items.values(), key=lambda item: order[item.picture])),
        tuple(skipped),
    )


def _item(line: str, folder: Path) -> Item:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("no JSON; expected image, question and answer") from None
    if not isinstance(entry, dict):
        raise InputError("no object; expected image, question and answer")
    for name in ("image", "question"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise InputError(f"{name} is {entry.get(name)!r}; expected a text")
    answers = entry.get("answer", entry.get("answers", []))
    answers = [answers] if isinstance(answers, (str, int)) else answers
    texts = isinstance(answers, list) and all(
        isinstance(a, (str, int)) and not isinstance(a, bool) for a in answers
    )
    if not texts:
        raise InputError(f"answer is {answers!r}; expected a text or a list of them")
    kind = entry.get("kind", "")
    if not isinstance(kind, str):
        raise InputError(f"kind is {kind!r}; expected a text")
    needed = entry.get("needed", [])
    numbers = isinstance(needed, list) and all(
        type(n) is int and n >= 0 for n in needed
    )
    if not numbers:
        raise InputError(f"needed is {needed!r}; expected numbers of visual tokens")
    picture = str(folder / entry["image"])
    load_image(picture)
    answers = tuple(map(str, answers))
    return Item(picture, entry["question"], answers, kind, needed=tuple(needed))


def _demo(pictures: int) -> Iterator[Item]:
    """Yield the held-out pictures of the demo model's training, with answers."""
    from ..scenes.held_out import held_out
    from ..scenes.pictures import check_fonts

    check_fonts()
    for number, (image, questions) in enumerate(held_out(pictures)):
        for question in filter(None, questions):
            yield Item(
                f"demo {number}",
                question.prompt,
                (question.answer,),
                question.kind,
                image,
            )
