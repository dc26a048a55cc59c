"""Speculative decoding: the tokens of a language model, several of them in a call.

Something quick drafts what may follow, the model reads all of it at once, and says
which of it stays and what comes instead of the rest (arXiv 2211.17192). Greedy tokens
are those without a draft, up to ties in float; sampled ones have its distribution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from .language import Decoder, greedy
from .positions import LayerCache

_LONGEST_MATCH = 3  # tokens by which a place in what was said before is told


class Draft(NamedTuple):
    """Tokens that may follow, and (L, V) logarithms of the shares that each had.

    log_shares: `None` for a guess that does not depend on chance.
    """

    tokens: list[int]
    log_shares: mx.array | None = None


class Drafter(Protocol):
    """What drafts."""

    def __call__(self, said: Sequence[int], most: int) -> Draft:
        """At most `most` tokens after an answer's; it may have none."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, as mlx-lm's sampler does; greedy at temperature 0."""

    temp: float = 0.0
    top_p: float = 0.0

    def log_shares(self, logits: mx.array) -> mx.array:
        """(..., V) logits -> logarithms of what each token is chosen with."""
        from mlx_lm.sample_utils import apply_top_p

        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if 0 < self.top_p < 1:
            logs = apply_top_p(logs, self.top_p)
        logs = logs / self.temp
        return logs - mx.logsumexp(logs, axis=-1, keepdims=True)

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array | None]:
        """(..., V) -> tokens (...), and the logarithms of shares they were drawn by."""
        if not self.temp:
            return mx.argmax(logits, axis=-1), None
        logs = self.log_shares(logits)
        return mx.random.categorical(logs), logs

    def accepted(self, draft: Draft, logits: mx.array) -> list[int]:
        """The tokens that stay, and the one that follows them.

        logits: (L + 1, V), the model's after what was said and after each of the L.
        """
        if not self.temp:
            _, found = greedy(logits)
            return agreed(draft.tokens, _ids(found))
        logs, count = self.log_shares(logits.astype(mx.float32)), len(draft.tokens)
        drafted = _log_shares(draft, logs.shape[-1])
        stays = 0
        if count:
            own, theirs = (
                mx.take_along_axis(some, mx.array(draft.tokens)[:, None], axis=1)
                for some in (logs[:-1], drafted)
            )
            lucky = mx.random.uniform(shape=(count, 1)) < mx.exp(own - theirs)
            stays = int(np.cumprod(np.array(lucky[:, 0])).sum())
        left = logs[stays]
        if stays < count:  # what the draft had too little of
            left = mx.log(mx.maximum(mx.exp(left) - mx.exp(drafted[stays]), 0))
        return [*draft.tokens[:stays], *_ids(mx.random.categorical(left[None]))]


def _ids(tokens: mx.array) -> list[int]:
    return [int(token) for token in np.array(tokens)]


def _log_shares(draft: Draft, vocabulary: int) -> mx.array:
    """(L, V); those of a guess are 1 and 0, and so are tokens that it does not know."""
    if draft.log_shares is None:
        given = mx.array(draft.tokens, mx.int32).reshape(-1, 1)
        return mx.where(mx.arange(vocabulary) == given, 0.0, -mx.inf)
    lacking = vocabulary - draft.log_shares.shape[-1]
    return mx.pad(draft.log_shares, [(0, 0), (0, lacking)], constant_values=-mx.inf)


def agreed(draft: Sequence[int], found: Sequence[int]) -> list[int]:
    """The model's tokens up to and with the first that the draft had otherwise."""
    right = 0
    while right < min(len(draft), len(found) - 1) and draft[right] == found[right]:
        right += 1
    return list(found[: right + 1])


def verify(
    decoder: Decoder,
    cache: Sequence[LayerCache],
    last: int,
    draft: Draft,
    sampling: Sampling,
) -> list[int]:
    """What follows `last`, in one call that also reads the draft.

    cache: what was said before `last`; then also it, and what stays of the draft.
    """
    given = mx.array([[last, *draft.tokens]], mx.int32)
    logits = decoder.logits(decoder.follow(given, list(cache)))[0]
    said = sampling.accepted(draft, logits)
    trim(cache, len(draft.tokens) + 1 - len(said))
    return said


def speculate(
    decoder: Decoder,
    cache: list[LayerCache],
    first: int,
    drafter: Drafter,
    width: int,
    most: int,
    sampling: Sampling,
    after_call=None,
) -> Iterator[list[int]]:
    """What follows the token `first`, at most `most` tokens, in parts of a call each.

    width: tokens that are drafted at once. after_call: called after each.
    """
    said = [first]
    while len(said) <= most:
        draft = drafter(said, min(width, most - len(said)))
        more = verify(decoder, cache, said[-1], draft, sampling)
        if after_call is not None:
            after_call()
        said += more
        yield more


def trim(cache: Sequence[LayerCache], count: int) -> None:
    """Forget the last tokens."""
    for part in cache:
        part.inner.trim(count)


# What drafts ------------------------------------------------------------------------


class Repeating:
    """Drafts what followed in a text before, or in this answer, after the same tokens.

    Prompt lookup, or n-gram speculation: no model runs.
    """

    def __init__(self, before: Sequence[int]):
        self._before = list(before)

    def __call__(self, said: Sequence[int], most: int) -> Draft:
        whole = [*self._before, *said]
        return Draft(continued(whole, said, near=len(whole))[:most])


class ReadingAlong:
    """Drafts by a language model that has read a prompt, its own or a shorter one.

    vocabulary: how many of its tokens the other model knows.
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
        self._held: list[int] = []  # what the cache has behind the prompt

    def __call__(self, said: Sequence[int], most: int) -> Draft:
        same = len(agreed(self._held, [*said, -1])) - 1
        trim(self._cache, len(self._held) - same)
        given, tokens, logs = mx.array([said[same:]], mx.int32), [], []
        for _ in range(most):
            hidden = self._decoder.follow(given, self._cache)[:, -1:]
            logits = self._decoder.logits(hidden)[:, 0, : self._vocabulary]
            token, shares = self._sampling.choose(logits.astype(mx.float32))
            given = token[:, None]
            tokens.append(token)
            logs += [] if shares is None else [shares]
        if not tokens:
            self._held = list(said[:same])
            return Draft([])
        found = _ids(mx.concatenate(tokens))
        self._held = [*said, *found[:-1]]
        return Draft(found, mx.concatenate(logs) if logs else None)


def continued(
    last: Sequence[int], said: Sequence[int], near: int | None = None
) -> list[int]:
    """What followed in `last`, where it went on as `said` ends.

    Of several such places the one with the longest match, and then the nearest to
    `near`, which is the length of `said` unless it is given.
    """
    best: tuple[int, int] | None = None
    place, near = 0, len(said) if near is None else near
    for end in range(1, len(last)):
        match = 0
        while match < min(_LONGEST_MATCH, end, len(said)):
            if last[end - 1 - match] != said[-1 - match]:
                break
            match += 1
        rank = (match, -abs(end - near))
        if match and (best is None or rank > best):
            best, place = rank, end
    return list(last[place:]) if best else []
