"""Speculative decoding: several tokens of a language model per call.

A drafter proposes the next tokens, the model reads all of them in one call, accepts a
part and replaces the rest (arXiv 2211.17192). Greedy tokens equal those without a
draft, up to ties in float; sampled output follows the model's distribution.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from .language import Decoder, greedy
from .positions import LayerCache

_LONGEST_MATCH = 3  # tokens of an n-gram that is looked up


class Draft(NamedTuple):
    """Proposed next tokens.

    tokens: L ids. log_shares: (L, V) log probabilities that they were sampled from;
    `None` for tokens that were not sampled.
    """

    tokens: list[int]
    log_shares: mx.array | None = None


class Drafter(Protocol):
    """Source of drafts."""

    def __call__(self, answer_ids: Sequence[int], most: int) -> Draft:
        """Propose at most `most` tokens after the answer's; possibly none."""
        ...


@dataclass(frozen=True)
class Sampling:
    """Sampling options, as in mlx-lm's sampler; greedy at temperature 0."""

    temp: float = 0.0
    top_p: float = 0.0

    def log_shares(self, logits: mx.array) -> mx.array:
        """Return the log probabilities (..., V) that tokens are sampled from."""
        from mlx_lm.sample_utils import apply_top_p

        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if 0 < self.top_p < 1:
            logs = apply_top_p(logs, self.top_p)
        logs = logs / self.temp
        return logs - mx.logsumexp(logs, axis=-1, keepdims=True)

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array | None]:
        """Choose tokens (...) from logits (..., V).

        Also returns the log probabilities (..., V) of the sampling; `None` for greedy.
        """
        if not self.temp:
            return mx.argmax(logits, axis=-1), None
        logs = self.log_shares(logits)
        return mx.random.categorical(logs), logs

    def accepted(self, draft: Draft, logits: mx.array) -> list[int]:
        """Return the accepted tokens of the draft, and the model's next token.

        logits: (L + 1, V), the model's before and after each of the L draft tokens.
        """
        if not self.temp:
            _, checked = greedy(logits)
            return agreed(draft.tokens, _ids(checked))
        logs, count = self.log_shares(logits.astype(mx.float32)), len(draft.tokens)
        drafted = _log_shares(draft, logs.shape[-1])
        kept = 0
        if count:
            target, proposal = (
                mx.take_along_axis(rows, mx.array(draft.tokens)[:, None], axis=1)
                for rows in (logs[:-1], drafted)
            )
            accepts = mx.random.uniform(shape=(count, 1)) < mx.exp(target - proposal)
            kept = int(np.cumprod(np.array(accepts[:, 0])).sum())
        rest = logs[kept]
        if kept < count:  # the excess over the draft's distribution corrects its bias
            rest = mx.log(mx.maximum(mx.exp(rest) - mx.exp(drafted[kept]), 0))
        return [*draft.tokens[:kept], *_ids(mx.random.categorical(rest[None]))]


def _ids(tokens: mx.array) -> list[int]:
    return [int(token) for token in np.array(tokens)]


def _log_shares(draft: Draft, vocabulary: int) -> mx.array:
    """Return the draft's log probabilities (L, V) over the model's vocabulary.

    Probabilities are 1 and 0 for tokens that were not sampled, and 0 for tokens that
    the drafter's smaller vocabulary lacks.
    """
    if draft.log_shares is None:
        draft_ids = mx.array(draft.tokens, mx.int32).reshape(-1, 1)
        return mx.where(mx.arange(vocabulary) == draft_ids, 0.0, -mx.inf)
    lacking = vocabulary - draft.log_shares.shape[-1]
    return mx.pad(draft.log_shares, [(0, 0), (0, lacking)], constant_values=-mx.inf)


def agreed(draft: Sequence[int], model_ids: Sequence[int]) -> list[int]:
    """Return the model's tokens up to and with the first that differs from the draft.

    model_ids: the model's tokens before and after each token of the draft.
    """
    most = min(len(draft), len(model_ids) - 1)
    right = 0
    while right < most and draft[right] == model_ids[right]:
        right += 1
    return list(model_ids[: right + 1])


def verify(
    decoder: Decoder,
    cache: Sequence[LayerCache],
    last: int,
    draft: Draft,
    sampling: Sampling,
) -> list[int]:
    """Return the tokens after `last`, by one call that also reads the draft.

    cache: holds the tokens before `last`; takes `last` and the accepted tokens, too.
    """
    input_ids = mx.array([[last, *draft.tokens]], mx.int32)
    logits = decoder.logits(decoder.follow(input_ids, list(cache)))[0]
    new_ids = sampling.accepted(draft, logits)
    # The last new token is not in the cache yet: the next call reads it.
    trim(cache, len(draft.tokens) + 1 - len(new_ids))
    return new_ids


def speculate(
    decoder: Decoder,
    cache: list[LayerCache],
    first: int,
    drafter: Drafter,
    width: int,
    most: int,
    sampling: Sampling,
    after_call: Callable[[], None] | None = None,
) -> Iterator[list[int]]:
    """Yield the tokens after `first`, at most `most` of them, in one list per call.

    width: most draft tokens per call. after_call: called after each call.
    """
    answer_ids = [first]
    while len(answer_ids) <= most:
        draft = drafter(answer_ids, min(width, most - len(answer_ids)))
        new_ids = verify(decoder, cache, answer_ids[-1], draft, sampling)
        if after_call is not None:
            after_call()
        answer_ids += new_ids
        yield new_ids


def trim(cache: Sequence[LayerCache], count: int) -> None:
    """Remove the last `count` tokens from every layer's cache."""
    for part in cache:
        part.inner.trim(count)


# Drafters ---------------------------------------------------------------------------


class NgramDrafter:
    """Drafter by n-gram lookup in the text before and in the answer.

    Proposes the tokens after an earlier occurrence of the answer's last tokens (prompt
    lookup); no model runs. before: token ids of the text.
    """

    def __init__(self, before: Sequence[int]):
        self._before = list(before)

    def __call__(self, answer_ids: Sequence[int], most: int) -> Draft:
        """Propose at most `most` tokens after the answer's."""
        whole = [*self._before, *answer_ids]
        return Draft(continued(whole, answer_ids, near=len(whole))[:most])


class ModelDrafter:
    """Drafter by a language model that has read the prompt, or a shorter one.

    cache: holds the prompt. vocabulary: number of first tokens of its vocabulary that
    the target model shares.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: list[LayerCache],
        sampling: Sampling,
        vocabulary: int,
    ):
        self._decoder, self._cache, self._sampling = decoder, cache, sampling
        self._vocabulary = vocabulary
        # Token ids that the cache holds after the prompt. They are kept between calls,
        # so that a call drops rejected drafts and reads new tokens only.
        self._cached: list[int] = []

    def __call__(self, answer_ids: Sequence[int], most: int) -> Draft:
        """Propose at most `most` tokens after the answer's."""
        same = len(agreed(self._cached, [*answer_ids, -1])) - 1
        trim(self._cache, len(self._cached) - same)
        input_ids, tokens, logs = mx.array([answer_ids[same:]], mx.int32), [], []
        for _ in range(most):
            hidden = self._decoder.follow(input_ids, self._cache)[:, -1:]
            logits = self._decoder.logits(hidden)[:, 0, : self._vocabulary]
            token, shares = self._sampling.choose(logits.astype(mx.float32))
            input_ids = token[:, None]
            tokens.append(token)
            logs += [] if shares is None else [shares]
        if not tokens:
            self._cached = list(answer_ids[:same])
            return Draft([])
        draft_ids = _ids(mx.concatenate(tokens))
        self._cached = [*answer_ids, *draft_ids[:-1]]
        return Draft(draft_ids, mx.concatenate(logs) if logs else None)


def continued(
    last: Sequence[int], answer_ids: Sequence[int], near: int | None = None
) -> list[int]:
    """Return the tokens of `last` after an occurrence of the answer's last tokens.

    Of several occurrences the longest match is chosen, then the nearest to place
    `near` (default: the length of `answer_ids`). Empty without an occurrence.
    """
    best: tuple[int, int] | None = None
    place, near = 0, len(answer_ids) if near is None else near
    for end in range(1, len(last)):
        match = 0
        while match < min(_LONGEST_MATCH, end, len(answer_ids)):
            if last[end - 1 - match] != answer_ids[-1 - match]:
                break
            match += 1
        rank = (match, -abs(end - near))
        if match and (best is None or rank > best):
            best, place = rank, end
    return list(last[place:]) if best else []
