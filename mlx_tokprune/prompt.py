"""Prompts: chat template, token ids around pictures, and the splice of embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .errors import InputError


@dataclass(frozen=True)
class Prompt:
    """Token ids of the text between pictures: one segment more than pictures."""

    segments: tuple[tuple[int, ...], ...]

    @property
    def pictures(self) -> int:
        return len(self.segments) - 1


def place_pictures(text: str, pictures: int, image_token: str) -> str:
    """The user's text with one `image_token` per picture.

    Text without any gets them in front, a line each. Raises `InputError` for an empty
    text, or when it has some but not one per picture.
    """
    if not isinstance(text, str):
        raise InputError(f"the prompt is a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid Unicode text") from None
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


def tokenize(text: str, image_token: str, encode: Callable[[str], list[int]]) -> Prompt:
    """Split at the pictures and encode each part on its own, as LLaVA does."""
    return Prompt(tuple(tuple(encode(part)) for part in text.split(image_token)))


def splice(
    prompt: Prompt, embed: Callable[[mx.array], mx.array], visual: mx.array
) -> mx.array:
    """(1, T, D) embeddings: text segments with the pictures (n, K, D) between them."""
    parts = []
    for number, segment in enumerate(prompt.segments):
        if segment:
            parts.append(embed(mx.array([segment])))
        if number < prompt.pictures:
            parts.append(visual[number : number + 1].astype(parts[0].dtype))
    return mx.concatenate(parts, axis=1)


def original_positions(
    prompt: Prompt, indices: Sequence[mx.array], total: int
) -> tuple[mx.array, int]:
    """Positions of the spliced prompt as if no visual token had been dropped.

    indices: per picture (K,), the kept tokens of `total`. Returns (T,) int32 and the
    shift of every token after the prompt.
    """
    parts, start, dropped = [], 0, 0
    for number, segment in enumerate(prompt.segments):
        parts.append(mx.arange(start, start + len(segment)))
        start += len(segment)
        if number < prompt.pictures:
            parts.append(start + indices[number])
            start += total
            dropped += total - indices[number].shape[0]
    return mx.concatenate([p.astype(mx.int32) for p in parts]), dropped
