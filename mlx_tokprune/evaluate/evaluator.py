"""Every question, unpruned and under every pruner, from features computed once."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoints.fingerprint import fingerprint
from ..features import Features
from ..generate.settings import Settings
from ..measure.accuracy import SCHEMA
from ..measure.results import Row
from ..measure.subject import Subject
from ..pipeline import Scene, VisualTokens, encode, prune_at_tower, run
from ..pipeline.planning import plan_for
from ..pruners import Plan
from .items import Item
from .judge_actions import Actions
from .judge_words import Words


class Evaluator:
    """Asks one model about pictures, keeping the features of the last one."""

    def __init__(self, subject: Subject, rows: Sequence[Row], settings: Settings):
        settings.check(subject.model)
        self.subject, self.rows, self.settings = subject, rows, settings
        self.model = subject.model
        kinds = {"answering": Words, "acting": Actions}
        self._speech = kinds[subject.kind](subject, settings.max_tokens)
        # Every extra that some row needs, computed at once.
        self._all = tuple(p for row in rows for p in self._plan(row))
        self._last: tuple[str, Features] | None = None

    def ask(self, item: Item) -> dict[str, dict]:
        """By label: the answer, its accuracy (`None` if unknown), whether it is the
        unpruned one, the mean KL divergence per token against it, tokens kept (mean
        over layers), the share of the needed ones that are left after every place
        (`None` if unknown), and FLOPs up to the first token.
        """
        scene = self.subject.scene([item.load()], item.question)
        features, records, unpruned = self._features(scene, item), {}, None
        for row in self.rows:
            plan = self._plan(row)
            asked = _Asked(self.model, scene, plan, self.settings, features)
            answer = self._answer(asked, unpruned)
            unpruned = unpruned or answer
            own = asked.kept if any(p.has_own_count for p in plan) else None
            counted = self.subject.count_shapes(scene, plan, own)
            records[row.label] = {
                **self._speech.judged(answer.ids, unpruned.ids, item.answers),
                "divergence": unpruned.divergence(answer),
                "kept": counted.tokens.mean,
                "needed": asked.share_of(item.needed),
                "flops": counted.flops,
            }
        return records

    def _plan(self, row: Row) -> Plan:
        return plan_for(self.model, row.pruners)

    def _features(self, scene: Scene, item: Item) -> Features:
        """Of the item's picture, kept for the next question about it."""
        if not self._last or self._last[0] != item.picture:
            features = encode(self.model, scene, self._all)
            mx.eval(features.arrays())
            self._last = (item.picture, features)
        return self._last[1]

    def _answer(self, asked: "_Asked", unpruned: "Answer | None") -> "Answer":
        """The prompt is read once: the unpruned answer is put behind it, and where it
        is another than this row's, the cache goes back to there.
        """
        from mlx_lm.generate import maybe_quantize_kv_cache
        from mlx_lm.models.cache import trim_prompt_cache

        decoder = self.model.decoder
        read = asked.read(decoder.make_cache())
        cache, logits = read.cache, decoder.logits(read.hidden)[0, -1:]
        maybe_quantize_kv_cache(cache, **self.settings.quantization)
        if unpruned is None:
            ids, logits = self._greedy([mx.argmax(logits).item()], cache, logits)
            return Answer(ids, logits)
        ids = unpruned.ids
        if len(ids) > 1:
            behind = decoder.follow(mx.array([ids[:-1]]), cache)
            logits = mx.concatenate([logits, decoder.logits(behind)[0]])
        chosen = np.array(mx.argmax(logits, axis=-1)).tolist()
        if chosen == ids:
            return Answer(ids, logits)
        same = next(n for n, own in enumerate(chosen) if own != ids[n])
        trim_prompt_cache(cache, len(ids) - 1 - same)
        own, _ = self._greedy([*ids[:same], chosen[same]], cache, logits)
        return Answer(own, logits)

    def _greedy(self, ids: list[int], cache, logits: mx.array):
        """Token ids up to and with the one that stops, and the logits of all of them.

        ids: those so far, of which the last is not in the cache yet. logits: theirs.
        """
        decoder, ids, found = self.model.decoder, list(ids), [logits]
        while ids[-1] not in self._speech.stops and len(ids) < self._speech.most:
            hidden = decoder.follow(mx.array([ids[-1:]]), cache)
            found.append(decoder.logits(hidden)[0])
            ids.append(mx.argmax(found[-1]).item())
        return ids, mx.concatenate(found)


class _Asked:
    """One question under one plan; the picture is looked at once."""

    def __init__(self, model, scene: Scene, plan: Plan, settings, features: Features):
        self._model, self._scene, self._plan = model, scene, plan
        self._positions = settings.positions
        self._visual = prune_at_tower(model, scene, plan, features)
        self.kept, self._chosen = 0, self._visual

    def share_of(self, needed: tuple[int, ...]) -> float | None:
        """Of tokens that a question needs, once it was read."""
        left = set(itertools.chain(*self._chosen.left()))
        return len(left.intersection(needed)) / len(needed) if needed else None

    def read(self, cache):
        def known(*_) -> VisualTokens:
            return self._visual

        how = {"positions": self._positions, "vision": known, "cache": cache}
        read, visual = run(self._model, self._scene, self._plan, **how)
        self.kept = visual.keep
        self._chosen = visual
        return read


class Answer:
    """Token ids, and the logits that each token of the unpruned answer follows from."""

    def __init__(self, ids: list[int], logits: mx.array):
        self.ids = ids
        self._logs = _log_softmax(logits)

    def divergence(self, other: "Answer") -> float:
        """KL of this one's distribution from the other's, mean over tokens, in nats."""
        gap = mx.exp(self._logs) * (self._logs - other._logs)
        return max(0.0, mx.mean(mx.sum(gap, axis=-1)).item())


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def describe_run(model, items: Sequence[Item], rows: Sequence[Row], **options) -> dict:
    """What makes two runs the same."""
    asked, seen = hashlib.sha256(), set()
    for item in items:
        if item.is_file and item.picture not in seen:
            seen.add(item.picture)
            asked.update(Path(item.picture).read_bytes())
        about = (item.picture, item.question, item.answers, item.kind, item.needed)
        asked.update(repr(about).encode())
    return {
        "schema": SCHEMA,
        "weights": fingerprint(model),
        "questions": asked.hexdigest()[:16],
        "rows": [row.described() for row in rows],
        **options,
    }
