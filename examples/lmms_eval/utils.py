"""What the task asks of this file: pictures of a line, and the score of an answer."""

from pathlib import Path

from mlx_tokprune.evaluate.judge_words import accuracy
from mlx_tokprune.processing.image import load_image


def pictures(doc: dict) -> list:
    return [load_image(Path("questions") / doc["image"])]


def judged(doc: dict, answers: list[str]) -> dict:
    """The accuracy of `mlx_tokprune.evaluate`, whose normalisation is that of VQA."""
    known = doc["answer"] if isinstance(doc["answer"], list) else [doc["answer"]]
    return {"vqa_accuracy": accuracy(answers[0], known)}
