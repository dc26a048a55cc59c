"""Questions about a generated picture, of five kinds, with correct answers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .pictures import COLORS, SHAPES, Scene, Thing

KINDS = ("color", "shape", "count", "where", "read")
SIDE = "side"  # "where" questions about left and right; for training only

_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Question:
    """Question of one kind, with its one correct answer."""

    kind: str
    prompt: str
    answer: str


def _name(thing: Thing, things: tuple[Thing, ...]) -> str | None:
    """Return the shortest phrase for this thing alone; `None` when there is none."""
    if sum(t.shape == thing.shape for t in things) == 1:
        return thing.shape
    alike = sum((t.shape, t.color) == (thing.shape, thing.color) for t in things)
    return f"{thing.color} {thing.shape}" if alike == 1 else None


def _ask_color(rng: np.random.Generator, scene: Scene) -> Question | None:
    unique = [t for t in scene.things if _name(t, scene.things) == t.shape]
    if not unique:
        return None
    thing = unique[rng.integers(len(unique))]
    return Question("color", f"What color is the {thing.shape}?", thing.color)


def _ask_shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    colors = [t.color for t in scene.things]
    unique = [t for t in scene.things if colors.count(t.color) == 1]
    if not unique:
        return None
    thing = unique[rng.integers(len(unique))]
    return Question("shape", f"What shape is {thing.color}?", thing.shape)


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question | None:
    form = rng.random()
    if form < 0.15:
        return Question("count", "How many shapes are there?", str(len(scene.things)))
    absent = rng.random() < 0.15
    if form < 0.65:
        present = [t.shape for t in scene.things]
        pool = [s for s in SHAPES if (s not in present) == absent]
        template = "How many {} are there?"
        plurals = {s: f"{s}es" if s == "cross" else f"{s}s" for s in SHAPES}
    else:
        present = [t.color for t in scene.things]
        pool = [c for c in COLORS if (c not in present) == absent]
        template = "How many shapes are {}?"
        plurals = {c: c for c in pool}
    if not pool:
        return None
    target = pool[rng.integers(len(pool))]
    prompt, answer = template.format(plurals[target]), str(present.count(target))
    return Question("count", prompt, answer)


def _ask_where(rng: np.random.Generator, scene: Scene) -> Question | None:
    named = [(t, n) for t in scene.things if (n := _name(t, scene.things))]
    if not named:
        return None
    a, name_a = named[rng.integers(len(named))]
    neighbours = [(t, n) for t, n in named if t is not a]
    if not neighbours or rng.random() < 0.25:
        dx, dy = a.x - scene.canvas / 2, a.y - scene.canvas / 2
        if min(abs(dx), abs(dy)) < 24:
            return None
        side = "left" if dx < 0 else "right"
        answer = f"{'top' if dy < 0 else 'bottom'} {side}"
        return Question("where", f"Where is the {name_a}?", answer)
    b, name_b = neighbours[rng.integers(len(neighbours))]
    dx, dy = a.x - b.x, a.y - b.y
    choices = []
    if abs(dx) >= 40:
        choices.append("left" if dx < 0 else "right")
    if abs(dy) >= 40:
        choices.append("above" if dy < 0 else "below")
    if not choices:
        return None
    truth = choices[rng.integers(len(choices))]
    if rng.random() < 0.5:
        pair = "left or right of" if truth in ("left", "right") else "above or below"
        return Question("where", f"Is the {name_a} {pair} the {name_b}?", truth)
    side = truth if rng.random() < 0.5 else _OPPOSITE[truth]
    phrase = f"{side} of" if side in ("left", "right") else side
    answer = "yes" if side == truth else "no"
    return Question("where", f"Is the {name_a} {phrase} the {name_b}?", answer)


def _ask_side(rng: np.random.Generator, scene: Scene) -> Question | None:
    # Few scenes allow it: draw up to six "where" questions.
    drawn = (_ask_where(rng, scene) for _ in range(6))
    sides = (q for q in drawn if q and ("left" in q.prompt or "right" in q.prompt))
    return next(sides, None)


def _ask_read(rng: np.random.Generator, scene: Scene) -> Question | None:
    if scene.sign is None:
        return None
    prompt = ("What does the sign say?", "What is written on the sign?")
    return Question("read", prompt[rng.integers(2)], scene.sign.text)


_ASK: dict[str, Callable[..., Question | None]] = dict(
    zip(KINDS, (_ask_color, _ask_shape, _ask_count, _ask_where, _ask_read), strict=True)
)
_ASK[SIDE] = _ask_side


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """Draw a question of a kind; return `None` when the scene does not allow one.

    kind: one of `KINDS`, or `SIDE`.
    """
    return _ASK[kind](rng, scene)


def ask_many(
    rng: np.random.Generator, scene: Scene, count: int, kinds: tuple[str, ...] = KINDS
) -> list[Question]:
    """Draw `count` questions, `kinds` in turn from a random start; repeats may occur.

    Every scene allows a "count" question, which replaces kinds that it does not allow.
    """
    questions: list[Question] = []
    turn = int(rng.integers(len(kinds)))
    while len(questions) < count:
        kind = kinds[turn % len(kinds)] if turn < 8 * count else "count"
        question = ask(rng, scene, kind)
        turn += 1
        if question is not None:
            questions.append(question)
    return questions
