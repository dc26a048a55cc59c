"""Processors: inputs and outputs of models as pixels, token ids and actions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from .actions import Bounds, bin_values, choose_statistics, read_bounds
from .chunks import ChunkProcessor
from .image import (
    middle_square,
    preprocess,
    preprocess_content,
    preprocess_cropped,
    preprocess_naive,
)
from .prompt import (
    Prompt,
    action_prompt,
    check_length,
    check_text,
    check_tokens,
    place_pictures,
    tokenize,
)

PADDINGS = ("keep", "skip")
_LARGEST = 4096  # px of an input, four times FastVLM's training size


@dataclass(frozen=True)
class Processor:
    """A converter of pictures and text to inputs; `tokenizer` is mlx-lm's wrapper.

    prefix, suffix: chat template around the user's text. opening, turn: its text before
    a system prompt, and between that or an answer and the user's text.
    stride: pixels per side of a visual token. context: the most tokens that the model
    reads. longest: characters of the longest token. crops: whether pictures are
    cropped to their middle square, not padded. marks: texts before and after a picture.
    """

    tokenizer: Any
    image_size: int
    image_token: str
    prefix: str
    suffix: str
    stride: int
    context: int
    padding: str = "keep"
    longest: int = 64
    crops: bool = False
    marks: tuple[str, str] = ("", "")
    opening: str = ""
    turn: str = ""
    pads = True

    def with_system(self, text: str) -> "Processor":
        """Return a copy with another system prompt.

        Raises `InputError` for a text that has a mark of a picture or is not Unicode.
        """
        check_text(text, "the system prompt")
        if self.image_token in text:
            raise InputError(
                f"the system prompt cannot hold {self.image_token}; write it in the "
                "question"
            )
        check_length(text, self.context, self.longest, "the system prompt")
        return dataclasses.replace(self, prefix=f"{self.opening}{text}{self.turn}")

    def at(self, image_size: int, padding: str | None = None) -> "Processor":
        """Return a copy for another input size or padding.

        image_size: pixels per side. padding: `keep` pads pictures to a square, as in
        training; `skip` leaves the padding out. Raises `InputError` for a size that
        cannot be encoded.
        """
        padding = padding or self.padding
        if padding not in PADDINGS:
            raise InputError(f"padding is {' or '.join(PADDINGS)}, not {padding!r}")
        if padding == "skip" and self.crops:
            raise InputError("this model crops pictures; expected padding keep")
        if image_size < self.stride or image_size % self.stride:
            near = max(self.stride, round(image_size / self.stride) * self.stride)
            raise InputError(
                f"cannot encode pictures of {image_size} px; expected a multiple of "
                f"{self.stride}, such as {near}"
            )
        if image_size > _LARGEST:
            raise InputError(
                f"cannot encode pictures of {image_size} px; the most is {_LARGEST}"
            )
        return dataclasses.replace(self, image_size=image_size, padding=padding)

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return RGB pictures as (B, S, S, 3) float32 in [0, 1].

        With padding `skip`: (B, h, w, 3), with S pixels on the longer side.
        """
        if self.crops:
            return preprocess_cropped(images, self.image_size)
        if self.padding == "skip":
            return preprocess_content(images, self.image_size, self.stride)
        return preprocess(images, self.image_size)

    def encoded(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Return the parts of the pictures that the model encodes."""
        return [middle_square(i) for i in images] if self.crops else list(images)

    def check(self, text: str, pictures: int) -> str:
        """Return the text with a mark for each picture, without tokenizing it.

        Raises `InputError` for an empty or too long text, or a wrong number of marks.
        """
        text = place_pictures(text, pictures, self.image_token)
        check_length(text, self.context, self.longest, "the prompt")
        return text

    def prompt(self, text: str, pictures: int) -> Prompt:
        """Return the user's text in the chat template, as token ids around pictures.

        Raises `InputError` for a text that `check` refuses, or with too many tokens.
        """
        text = self.check(text, pictures)
        chat = f"{self.prefix}{text}{self.suffix}"
        chat = chat.replace(self.image_token, self.image_token.join(self.marks))
        prompt = tokenize(chat, self.image_token, self._encode)
        check_tokens(sum(map(len, prompt.segments)), self.context, "the prompt")
        return prompt

    def continued(self, text: str) -> list[int]:
        """Return the token ids of the user's later text, from the end of an answer on.

        Raises `InputError` for an empty or too long text, and for marks of pictures.
        """
        check_text(text, "the prompt")
        if self.image_token in text:
            raise InputError(
                "pictures stand in the first question; leave out "
                f"{self.image_token}, or begin another conversation"
            )
        text = self.check(text, 0)
        return self._encode(f"{self.turn}{text}{self.suffix}")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class ActionProcessor:
    """A converter of pictures and instructions to inputs, and of tokens to actions.

    limit: the most tokens of an instruction's prompt. norm_stats: statistics of each
    data set, by unnorm key. crop, resample, jpeg: preparation of pictures, as in
    `preprocess_naive`. longest: characters of the longest token.
    """

    tokenizer: Any
    image_size: int
    vocabulary: int
    bins: int
    empty_token_id: int
    limit: int
    norm_stats: dict
    rule: str = "bounds_q99"
    crop: float = 1.0
    resample: Image.Resampling = Image.Resampling.BICUBIC
    longest: int = 64
    jpeg: int = 0
    pads = False

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return RGB pictures as (B, S, S, 3) float32 in [0, 1], without padding."""
        options = (self.crop, self.resample, self.jpeg)
        return preprocess_naive(images, self.image_size, *options)

    def prompt(self, instruction: str) -> Prompt:
        """Return the ids before and after the pictures.

        Raises `InputError` for an instruction that is empty or too long.
        """
        text = action_prompt(instruction)
        check_length(text, self.limit, self.longest, "the instruction")
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if ids[-1:] != [self.empty_token_id]:
            ids = [*ids, self.empty_token_id]
        check_tokens(len(ids), self.limit, "the instruction with its prompt")
        return Prompt(((self.tokenizer.bos_token_id,), tuple(ids)))

    def bounds(self, part: str, unnorm_key: str | None) -> Bounds:
        """Return the range of `action` or `proprio` in one data set."""
        statistics = choose_statistics(self.norm_stats, unnorm_key)
        return read_bounds(statistics, part, self.rule)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """Return the values in [-1, 1] of action token ids (..., A)."""
        return bin_values(ids, self.vocabulary, self.bins)


PolicyProcessor = ActionProcessor | ChunkProcessor
AnyProcessor = Processor | PolicyProcessor


def check_answers(processor: AnyProcessor) -> Processor:
    """Return the processor; raise `InputError` if its model is a policy."""
    if not isinstance(processor, Processor):
        raise InputError(
            "this model answers in actions, not in words; expected a FastVLM "
            "checkpoint, such as 'demo' (mlx_tokprune act runs policies)"
        )
    return processor


def check_acts(processor: AnyProcessor) -> PolicyProcessor:
    """Return the processor; raise `InputError` if its model answers in words."""
    if isinstance(processor, PolicyProcessor):
        return processor
    raise InputError(
        "this model answers in words, not in actions; expected a policy, such as "
        "'demo-policy' (mlx_tokprune generate runs models that answer)"
    )
