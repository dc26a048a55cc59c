"""Every question to a model that mlx-vlm runs, untouched and under every pruner."""

from collections.abc import Sequence

import mlx.core as mx

from ..errors import InputError
from ..measure.guest import Guest, GuestRow
from .items import Item, Questions
from .judge_words import judge


def readable(guest: Guest, rows: Sequence[GuestRow], questions: Questions) -> Questions:
    """Those about pictures that mlx-vlm takes; the others are skipped.

    Raises `InputError` when none is left.
    """
    items, skipped, reasons = [], list(questions.skipped), {}
    for item in questions.items:
        image = item.load()
        if image.size not in reasons:
            try:
                reasons[image.size] = guest.check(image, rows)
            except InputError as error:
                reasons[image.size] = str(error)
        if reasons[image.size] is None:
            items.append(item)
        else:
            skipped.append((item.line, reasons[image.size]))
    if not items:
        raise InputError(
            f"no question is left; line {skipped[-1][0]}: {skipped[-1][1]}"
        )
    return Questions(tuple(items), tuple(sorted(skipped)))


class GuestEvaluator:
    """Asks one model; what it gives is what `Evaluator` gives."""

    def __init__(self, guest: Guest, rows: Sequence[GuestRow], most: int):
        self.guest, self.rows, self.most = guest, rows, most

    def ask(self, item: Item) -> dict[str, dict]:
        image, records, decode = item.load(), {}, self.guest.decode
        reference = self.guest.ask(self.rows[0], image, item.question, self.most)
        for row in self.rows:
            reply, divergence = reference, 0.0
            if row is not self.rows[0]:
                asked = (row, image, item.question, self.most)
                reply = self.guest.ask(*asked)
                same = reply.ids == reference.ids
                forced = reply if same else self.guest.ask(*asked, reference.ids)
                divergence = _divergence(reference.logs, forced.logs)
            cost = self.guest.cost(row, image, item.question, reply.kept)
            records[row.label] = {
                **judge(decode(reply.ids), decode(reference.ids), item.answers),
                "divergence": divergence,
                "kept": reply.kept,
                "flops": cost and sum(part.flops for part in cost.values()),
            }
        return records


def _divergence(wanted: list[mx.array], found: list[mx.array]) -> float:
    """KL of the first distributions from the others, mean over tokens, in nats."""
    pairs = zip(wanted, found, strict=True)
    parts = [mx.sum(mx.exp(a) * (a - b)) for a, b in pairs]
    return max(0.0, mx.mean(mx.stack(parts)).item())
