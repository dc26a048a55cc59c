"""Questions about generated pictures as files that `evaluate` and `train` read."""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from mlx_tokprune.files import new_folder

FILE = "questions.jsonl"


def write_questions(
    rows: Iterable[tuple[Image.Image, list[dict]]], output: str | Path
) -> Path:
    """Write pictures and a line for each question to a new folder; return the lines.

    rows: each picture with its questions, objects with `question`, `answer`, and the
    further fields that `evaluate --data` reads.
    """
    with new_folder(output) as folder:
        with (folder / FILE).open("w") as lines:
            for number, (picture, questions) in enumerate(rows):
                name = f"{number:05}.png"
                picture.save(folder / name)
                for question in questions:
                    lines.write(json.dumps({"image": name, **question}) + "\n")
    return Path(output) / FILE
