"""`Chat`: several questions about pictures, whose pruned cache is kept between them."""

import contextlib
import dataclasses
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import InputError, note
from ..models.language import ReadResult
from ..models.positions import LayerCache
from ..models.protocol import VisionModel
from ..models.speculative import agreed
from ..pipeline import VisualTokens
from ..processing.processor import AnyProcessor, Processor, check_answers
from ..processing.prompt import Prompt
from ..pruners import Pruners
from .drafts import Drafts, PrefillResult, SelfDrafts
from .settings import Settings
from .stream import (
    AnswerStart,
    Question,
    Response,
    context_room,
    decoded,
    open_answer,
    prepare,
    stream,
)


@dataclass(frozen=True)
class Answer:
    """Whole answer to one question of a chat.

    token_ids: tokens of the answer, its end token included. last: the last piece, with
    times, `reused` tokens of the kept cache, visual tokens and the finish reason.
    """

    text: str
    token_ids: list[int]
    last: Response


@dataclass
class _Conversation:
    """What a chat keeps between questions.

    prompt: token ids of all texts so far. cache: holds all of them but the last, the
    `pending` ids.
    """

    prompt: Prompt
    visual: VisualTokens
    cache: list[LayerCache]
    pending: list[int]


class Chat:
    """Conversation about pictures: `Chat(model, processor, images).ask("What?")`.

    images: as in `generate`; they stand in the first question. Their visual tokens are
    encoded and pruned with it, and later questions read the kept cache. A pruner that
    reads the question thus prunes by the first one. pruner, draft, settings: as in
    `stream_generate`; `max_kv_size` bounds the conversation. Answers equal those to the
    whole conversation read anew, up to ties in float.
    """

    def __init__(
        self,
        model: VisionModel,
        processor: AnyProcessor,
        images: Any,
        *,
        pruner: Pruners = None,
        draft: Drafts | None = None,
        **settings: Any,
    ):
        chosen = Settings(**settings)
        if isinstance(draft, SelfDrafts) and chosen.kv_bits is not None:
            raise InputError("a model drafts for itself from a cache without kv_bits")
        self._model, self._processor = model, check_answers(processor)
        self._pruner, self._draft, self._most = pruner, draft, chosen.max_kv_size
        self._settings = dataclasses.asdict(chosen) | {"max_kv_size": None}
        self.reset(images)

    def reset(self, images: Any = None) -> None:
        """Begin another conversation. images: new pictures; `None` for the same."""
        if images is not None:
            self._images = decoded(images)
        self._kept: _Conversation | None = None
        self._is_answering = False

    def ask(self, question: str) -> Answer:
        """Return the answer to a question; raises `InputError` as `stream` does."""
        pieces = list(self.stream(question))
        text = "".join(piece.text for piece in pieces)
        return Answer(text, [piece.token for piece in pieces], pieces[-1])

    def stream(self, question: str) -> Generator[Response]:
        """Stream the answer to a question.

        The conversation goes on behind what was streamed, also if that was stopped
        early. Raises `InputError`, and leaves the conversation as it was, for an
        unusable question and for one that does not fit.
        """
        if self._is_answering:
            raise InputError("an answer is being streamed; finish or close it first")
        self._is_answering = True
        try:
            yield from self._stream(question)
        finally:
            self._is_answering = False

    def _stream(self, text: str) -> Generator[Response]:
        kept, ids, shown = self._kept, [], ""
        options = (self._pruner, None, None, self._draft, False, self._settings)
        first = text if kept is None else "-"  # later ones stand behind the answer
        question = prepare(self._model, self._processor, self._images, first, *options)
        starts: list[PrefillResult] = []

        def opened(question: Question) -> AnswerStart:
            start = (
                self._begin(question) if kept is None else self._go_on(question, text)
            )
            starts.append(start.prefill)
            return start

        lengths = [] if kept is None else _lengths(kept.cache)
        try:
            with contextlib.closing(stream(question, opened)) as pieces:
                for piece in pieces:
                    ids.append(piece.token)
                    shown += piece.text
                    yield piece
        finally:
            if ids:
                self._keep(question.processor, starts[0], ids, shown)
            elif kept is not None:  # as before the question
                _trim(kept.cache, lengths)

    def _begin(self, question: Question) -> AnswerStart:
        """Read the first question with the pictures."""
        start = open_answer(question)
        self._lengths = _lengths(start.prefill.read.cache)
        return start._replace(room=self._room(max(self._lengths)))

    def _go_on(self, question: Question, text: str) -> AnswerStart:
        """Read a later question behind the kept cache."""
        kept, model, processor = self._kept, question.model, question.processor
        if kept is None:
            raise ValueError("no question came before")
        if any(pruner.place != "tower" for pruner in question.plan):
            note("the pictures stay pruned as the first question of the chat chose")
        new_ids = processor.continued(text)
        prompt = _joined(kept.prompt, new_ids)
        ids = [*kept.pending, *new_ids]
        length = max(_lengths(kept.cache)) + len(ids)
        room = self._room(length)
        if min(room, context_room(question, prompt, kept.visual)) < 1:
            raise InputError(
                f"the conversation does not fit: it has {length} tokens with this "
                "question; begin another one, or ask a shorter question"
            )
        reused, step = kept.cache[0].inner.offset, question.settings.prefill_step_size
        hidden = mx.zeros(())
        for begin in range(0, len(ids), step):
            part = mx.array([ids[begin : begin + step]], mx.int32)
            hidden = model.decoder.follow(part, kept.cache)[:, -1:]
            mx.eval(hidden)
        self._lengths = _lengths(kept.cache)
        prefill = PrefillResult(
            *(model, question.images, prompt, ReadResult(hidden, kept.cache)),
            *(kept.visual, question.settings),
        )
        return AnswerStart(prefill, reused, lambda: None, room)

    def _room(self, length: int) -> int:
        """Return the tokens that fit behind `length` tokens of the conversation."""
        room = sys.maxsize if self._most is None else self._most - length
        if room < 1:
            raise InputError(
                f"the conversation has {length} tokens, but max_kv_size is "
                f"{self._most}; begin another one, or give a larger cache"
            )
        return room

    def _keep(
        self, processor: Processor, prefill: PrefillResult, ids: list[int], shown: str
    ) -> None:
        """Keep the conversation with the answer, and un-read what is not part of it."""
        ends, tokenizer = processor.tokenizer.eos_token_ids, processor.tokenizer
        answer_ids = ids[:-1] if ids[-1] in ends else ids
        cut = self._settings["stop"] and answer_ids is ids
        if cut and tokenizer.decode(answer_ids) != shown:
            answer_ids = tokenizer.encode(shown, add_special_tokens=False)
        cache = prefill.read.cache
        fed = cache[0].inner.offset - self._lengths[0]
        same = len(agreed(answer_ids, [*ids[:fed], -1])) - 1
        _trim(cache, [length + same for length in self._lengths])
        prompt = _joined(prefill.prompt, answer_ids)
        self._kept = _Conversation(prompt, prefill.visual, cache, answer_ids[same:])


def _joined(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """Return a prompt with token ids behind its last segment."""
    *first, last = prompt.segments
    return Prompt((*first, (*map(int, last), *ids)))


def _lengths(cache: Sequence[LayerCache]) -> list[int]:
    return [part.inner.offset for part in cache]


def _trim(cache: Sequence[LayerCache], lengths: Sequence[int]) -> None:
    """Remove the tokens behind the first `lengths` from each layer's cache."""
    for part, length in zip(cache, lengths, strict=True):
        part.inner.trim(part.inner.offset - length)
