"""Inputs and outputs of pi0-FAST policies: prompts with the state, action chunks.

The two references differ, and a checkpoint belongs to one of them. `openpi` writes
tasks in lower case, ends at the stop token and returns zeros for damaged answers.
`lerobot` puts a second <bos> behind the prompt, ends at "|", and pads or cuts damaged
answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..errors import InputError
from .actions import (
    Bounds,
    Deviations,
    Scale,
    choose_statistics,
    read_bounds,
    read_deviations,
)
from .fast import FastCode
from .image import preprocess_fitted
from .prompt import Prompt, check_length, check_tokens, state_prompt

Dialect = Literal["lerobot", "openpi"]
_EDGES = np.linspace(-1, 1, 257)[:-1]


@dataclass(frozen=True)
class ChunkProcessor:
    """A converter of pictures, instructions and states to inputs, answers to actions.

    rules: the rule of normalisation of `action` and `proprio`, "identity" for none.
    horizon, size: actions of a chunk, and numbers of an action. skipped: tokens at the
    end of the tokenizer's vocabulary, below which FAST's tokens count down. embedded:
    number of token ids with an embedding. limit: the most tokens of a prompt. strict:
    an answer must begin with "Action:". longest: characters of the longest token.
    """

    tokenizer: Any
    image_size: int
    code: FastCode
    norm_stats: dict
    rules: Mapping[str, str]
    horizon: int
    size: int
    skipped: int
    embedded: int
    limit: int
    dialect: Dialect = "lerobot"
    strict: bool = True
    longest: int = 64
    crop = 1.0
    pads = True

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return RGB pictures as (B, S, S, 3) float32 in [0, 1], padded with black."""
        return preprocess_fitted(images, self.image_size)

    def prompt(self, instruction: str, state: np.ndarray) -> Prompt:
        """Return the prompt of an instruction and a normalised state (p,).

        Raises `InputError` for an instruction that is empty, too long (the references
        cut it), or has a token without an embedding.
        """
        bins = np.digitize(state, _EDGES) - 1
        text = state_prompt(instruction, bins.tolist(), self.dialect == "openpi")
        name = "the instruction with the state"
        check_length(text, self.limit, self.longest, name)
        ids, start = self.tokenizer.encode(text), self.tokenizer.bos_token_id
        if self.dialect == "openpi":
            ids = [start, *self.tokenizer.encode(text, add_special_tokens=False)]
        check_tokens(len(ids), self.limit, name)
        if max(ids) >= self.embedded:
            raise InputError(
                f"the instruction has token {max(ids)}, and the model has embeddings "
                f"of {self.embedded}; leave out what stands for a picture"
            )
        return Prompt(((), (*ids, start) if self.dialect == "lerobot" else tuple(ids)))

    def bounds(self, part: str, unnorm_key: str | None) -> Scale:
        """Return the scale of `action` or `proprio` in one data set."""
        rule = self.rules[part]
        if rule == "identity":
            size = self.size if part == "action" else 0
            return Bounds(np.zeros(size), np.zeros(size), np.zeros(size, bool))
        statistics = choose_statistics(self.norm_stats, unnorm_key)
        if rule == "mean_std":
            scale = read_deviations(statistics, part)
            if self.dialect == "openpi":
                return Deviations(scale.mean, scale.std + 1e-6, eps=0)
            return scale
        bounds = read_bounds(statistics, part, rule)
        if self.dialect == "openpi":
            return Bounds(bounds.low, bounds.high + 1e-6, bounds.mask)
        return bounds

    @property
    def stop(self) -> int:
        """Token id that ends an answer."""
        if self.dialect == "openpi":
            return self.tokenizer.eos_token_id
        return self._id("|")

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def answer(self, chunk: np.ndarray) -> list[int]:
        """Return the token ids of an answer: normalised actions (horizon, size)."""
        head = self.tokenizer.encode("Action: ", add_special_tokens=False)
        last = self.tokenizer.vocab_size - 1 - self.skipped
        return [*head, *(last - t for t in self.code.encode(chunk)), self.stop]

    def actions(self, answer_ids: Sequence[int]) -> tuple[np.ndarray, str | None]:
        """Return normalised actions (horizon, size) of an answer, and its fault.

        The fault is `None` for an undamaged answer. Raises `InputError` for an answer
        that does not begin with "Action:", if `strict`.
        """
        ids = [int(number) for number in answer_ids]
        head = self.tokenizer.encode("Action: ", add_special_tokens=False)
        if self.dialect == "openpi":
            begin = _find(ids, head)
            if begin is None:
                nothing = np.zeros((self.horizon, self.size))
                return nothing, "an answer without 'Action: '"
            ids = ids[begin + len(head) :]
            ids = ids[: _find(ids, head)]
        elif self.strict and ids[:2] != head[:2]:
            raise InputError(
                "the policy's answer does not begin with 'Action:'; it was not trained "
                "to answer this, or its weights are damaged"
            )
        ids = ids[: ids.index(self._id("|"))] if self._id("|") in ids else ids
        while (at := _find(ids, head)) is not None:
            ids = ids[:at] + ids[at + len(head) :]
        last = self.tokenizer.vocab_size - 1 - self.skipped
        relaxed = self.dialect == "lerobot"
        codes = [last - number for number in ids]
        return self.code.decode(codes, self.horizon, self.size, relaxed)


def _find(ids: list[int], part: list[int]) -> int | None:
    """Return the index of the first `part` in `ids`, or `None`."""
    starts = range(len(ids) - len(part) + 1)
    return next((i for i in starts if ids[i : i + len(part)] == part), None)
