"""Every question, unpruned and under every pruner, from features computed once."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from .. import files
from ..features import Features
from ..files import write_text
from ..pipeline import Prefill, VisualTokens, assemble, first_logits
from ..pruners import Pruner
from .data import Item
from .vqa import accuracy, normalize

SCHEMA = "mlx_tokprune.evaluate/1"


@dataclass(frozen=True)
class Row:
    """A pruner and the label it has in tables."""

    label: str
    pruner: Pruner


def make_rows(
    methods: Sequence[str], ratios: Sequence[float], budgets: Sequence[int]
) -> list[Row]:
    """The unpruned model, then every method at every ratio or number of tokens."""
    rows = [Row("none", Pruner("none"))]
    for method in methods:
        rows += [Row(f"{method} {r:g}", Pruner(method, r)) for r in ratios if r < 1]
        rows += [
            Row(f"{method} {n} tokens", Pruner(method, keep_tokens=n)) for n in budgets
        ]
    return list({row.label: row for row in rows}.values())


class Evaluator:
    """Answers questions about pictures with one model, keeping its last picture."""

    def __init__(
        self, model, processor, rows: Sequence[Row], positions: str, most: int
    ):
        self.model, self.processor = model, processor
        self.rows, self.positions, self.most = rows, positions, most
        self._needs = tuple({name for row in rows for name in row.pruner.needs})
        self._last: tuple[str, Features] | None = None

    def ask(self, item: Item) -> dict[str, dict]:
        """By label: the answer, its accuracy (`None` if unknown), whether it is the
        unpruned one, the mean KL divergence per token against it, and tokens kept.
        """
        features = self._features(item)
        prompt = self.processor.prompt(item.question, 1)
        records, reference = {}, None
        for row in self.rows:
            prefill, kept = self._prefill(prompt, features, row.pruner)
            if reference is None:
                ids = self._greedy(prefill)
                reference = Reference(ids, self._forced(prefill, ids))
                given, divergence = ids, 0.0
            else:
                logits = self._forced(prefill, reference.ids)
                divergence = reference.divergence(logits)
                same = np.array(mx.argmax(logits, axis=-1)).tolist() == reference.ids
                given = reference.ids if same else self._greedy(prefill)
            text = self._text(given)
            right = accuracy(text, item.answers) if item.answers else None
            records[row.label] = {
                "answer": text,
                "accuracy": right,
                "agrees": normalize(text) == normalize(self._text(reference.ids)),
                "divergence": divergence,
                "kept": kept,
            }
        return records

    def _features(self, item: Item) -> Features:
        """Of the item's picture, kept for the next question about it."""
        if self._last and self._last[0] == item.picture:
            return self._last[1]
        pixels = mx.array(self.processor.pixels([item.load()]))
        features = self.model.encode(pixels, self._needs)
        mx.eval([a for a in (features.tokens, features.attention) if a is not None])
        self._last = (item.picture, features)
        return features

    def _prefill(self, prompt, features: Features, pruner: Pruner):
        selection = pruner(features)
        embeddings = self.model.project(selection.apply(features.tokens))
        visual = VisualTokens(embeddings, selection, features.grid)
        return assemble(self.model, prompt, visual, self.positions), selection.keep

    def _greedy(self, prefill: Prefill) -> list[int]:
        """Token ids up to and with the one that stops."""
        from mlx_lm.models.cache import make_prompt_cache

        cache, ids = make_prompt_cache(self.model), []
        logits = first_logits(self.model, prefill, cache)
        while True:
            ids.append(mx.argmax(logits, axis=-1).item())
            if ids[-1] in self.processor.tokenizer.eos_token_ids:
                return ids
            if len(ids) == self.most:
                return ids
            with self.model.positions.using(prefill.positions, prefill.shift):
                logits = self.model(mx.array([ids[-1:]]), cache=cache)[:, -1]

    def _forced(self, prefill: Prefill, ids: list[int]) -> mx.array:
        """Logits (len(ids), V) from which each of `ids` follows, given those before."""
        told = self.model.embed(mx.array([ids[:-1]], mx.int32))
        whole = mx.concatenate([prefill.embeddings, told], axis=1)
        where = prefill.positions
        if where is not None:
            length = prefill.embeddings.shape[1]
            more = length + prefill.shift + mx.arange(len(ids) - 1)
            where = mx.concatenate([where, more.astype(where.dtype)])
        with self.model.positions.using(where, prefill.shift):
            logits = self.model(None, input_embeddings=whole)
        return logits[0, -len(ids) :]

    def _text(self, ids: list[int]) -> str:
        stops = self.processor.tokenizer.eos_token_ids
        return self.processor.tokenizer.decode([i for i in ids if i not in stops])


class Reference:
    """The unpruned model's answer and its logits."""

    def __init__(self, ids: list[int], logits: mx.array):
        self.ids = ids
        self._logs = _log_softmax(logits)

    def divergence(self, logits: mx.array) -> float:
        """KL of the unpruned distribution from these, mean over tokens, in nats."""
        gap = mx.exp(self._logs) * (self._logs - _log_softmax(logits))
        return max(0.0, mx.mean(mx.sum(gap, axis=-1)).item())


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# Keeping what was measured ----------------------------------------------------------


class Journal:
    """A line of JSON for each question that was answered.

    The first line says what was asked of which weights; a journal of anything else is
    begun again.
    """

    def __init__(self, file: Path, header: dict):
        self.file, self.records, self._lines = file, {}, [json.dumps(header)]
        lines = file.read_text().splitlines() if file.exists() else []
        if lines and _parsed(lines[0]) == header:
            for line in filter(None, map(_parsed, lines[1:])):
                self.records[line["item"]] = line["rows"]
                self._lines.append(json.dumps(line))

    def add(self, item: int, rows: dict) -> None:
        line = json.dumps({"item": item, "rows": rows})
        if self._lines:  # what was there, without a line that was cut
            write_text(self.file, "\n".join([*self._lines, line]) + "\n")
            self._lines = []
        else:
            with self.file.open("a") as stream:
                stream.write(line + "\n")
        self.records[item] = rows


def _parsed(line: str) -> dict | None:
    """The last line of a run that was killed may be cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def describe_run(model, items: Sequence[Item], rows: Sequence[Row], **options) -> dict:
    """What makes two runs the same."""
    asked = hashlib.sha256()
    for item in items:
        asked.update(repr((item.picture, item.question, item.answers)).encode())
    return {
        "schema": SCHEMA,
        "weights": fingerprint(model),
        "questions": asked.hexdigest()[:16],
        "rows": [dataclasses.asdict(row) for row in rows],
        **options,
    }


def fingerprint(model) -> str:
    """Of a model's weights: of what each tensor is called, and a sum over it."""
    digest = hashlib.sha256()
    for name, array in sorted(tree_flatten(model.parameters())):
        total = mx.sum(mx.abs(array.astype(mx.float32))).item()
        digest.update(f"{name} {array.shape} {total!r}".encode())
    return digest.hexdigest()[:16]


def answer_all(
    evaluator: Evaluator, items: Sequence[Item], mine: Sequence[int], journal: Journal
) -> dict[int, dict]:
    """Records of the items whose numbers are `mine`."""
    todo = [number for number in mine if number not in journal.records]
    for number in tqdm(todo, desc="questions", unit="question", disable=None):
        journal.add(number, evaluator.ask(items[number]))
    return {number: journal.records[number] for number in mine}


def accuracies(result: dict) -> dict[tuple[str, int], float]:
    """Accuracy over all questions, by label and input size."""
    return {
        (row["label"], result["image_size"]): row["accuracy"]["all"]["value"]
        for row in result["rows"]
        if row["accuracy"]
    }


def read_result(file: Path) -> dict:
    """A result file; `InputError` unless it is one of this schema."""
    return files.read_result(file, SCHEMA)
