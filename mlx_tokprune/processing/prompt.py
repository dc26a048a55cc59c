"""Prompts: the chat template, and token ids around pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import InputError


@dataclass(frozen=True)
class Prompt:
    """Token ids of the text around pictures: one segment more than places of pictures.

    Segments are tuples of numbers, arrays (L,) in a compiled call, or arrays (B, L) if
    the samples of a scene have different prompts.
    """

    segments: tuple[tuple[int, ...] | mx.array, ...]

    @property
    def places(self) -> int:
        """Number of places for pictures."""
        return len(self.segments) - 1

    def ids(self) -> list[int]:
        """Return the token ids of all segments of one sample in one list."""
        return [int(token) for segment in self.segments for token in segment]

    def arrays(self) -> list[mx.array]:
        """Return each segment as (1 or B, L) int32."""
        arrays = [mx.array(ids, mx.int32) for ids in self.segments]
        return [ids if ids.ndim == 2 else ids[None] for ids in arrays]


def place_pictures(text: str, pictures: int, image_token: str) -> str:
    """Return the user's text with one `image_token` per picture.

    A text without any gets them in front, one per line. Raises `InputError` for an
    empty text, or for another number of them than pictures.
    """
    check_text(text, "the prompt")
    if not text.replace(image_token, "").strip():
        raise InputError("the prompt is empty; expected a question or an instruction")
    placed = text.count(image_token)
    if placed == 0:
        return f"{image_token}\n" * pictures + text
    if placed != pictures:
        raise InputError(
            f"the prompt has {placed} {image_token} but there "
            f"{'is 1 picture' if pictures == 1 else f'are {pictures} pictures'}; "
            f"write one {image_token} per picture, or none to put them in front"
        )
    return text


def check_text(text: str, name: str) -> None:
    """Raise `InputError` unless `text` is valid Unicode. name: its name in errors."""
    if not isinstance(text, str):
        raise InputError(f"{name} is a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} is not valid Unicode text") from None


def check_length(text: str, limit: int, longest: int, name: str) -> None:
    """Raise `InputError` for a text that cannot fit, before it is tokenized."""
    if len(text) > limit * longest:
        raise InputError(
            f"{name} is too long: it has {len(text)} characters, and the {limit} "
            f"tokens that fit have at most {limit * longest}"
        )


def check_tokens(count: int, limit: int, name: str) -> None:
    """Raise `InputError` for more tokens than the model reads."""
    if count > limit:
        raise InputError(
            f"{name} is too long: it has {count} tokens, and the model reads {limit}"
        )


def _check_instruction(instruction: str) -> None:
    check_text(instruction, "the instruction")
    if not instruction.replace("_", " ").strip():
        raise InputError("the instruction is empty; expected what the robot should do")


def action_prompt(instruction: str) -> str:
    """Return OpenVLA's prompt of an instruction, in lower case as in its scripts.

    Raises `InputError` for an empty instruction.
    """
    _check_instruction(instruction)
    return (
        f"In: What action should the robot take to {instruction.strip().lower()}?\nOut:"
    )


def state_prompt(instruction: str, bins: Sequence[int], lower: bool) -> str:
    """Return pi0-FAST's prompt: the task, and the bins of the state, -1 to 255.

    lower: write the task in lower case, as openpi does; lerobot does not. Raises
    `InputError` for an empty instruction.
    """
    _check_instruction(instruction)
    task = instruction.strip().replace("_", " ").replace("\n", " ")
    task = task.lower() if lower else task
    return f"Task: {task}, State: {' '.join(map(str, bins))};\n"


def tokenize(text: str, image_token: str, encode: Callable[[str], list[int]]) -> Prompt:
    """Split at the image tokens and encode each part separately, as LLaVA does."""
    return Prompt(tuple(tuple(encode(part)) for part in text.split(image_token)))
