"""Group 8: two threads on one model, each with its own pruner."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

from .asks import PICTURES, POLICY, TINY
from .case import Outcome, Place, call, judge

WAYS = (
    *(("none",), ("norm", 0.25), ("attention", 0.5), ("uniform", 0.1)),
    *(("similarity", 0.5), ("trimvla", 0.5), ("spatial", 0.5)),
)
TEXTS = ("What?", "Who is it?", "Is there a red cup on the table?")


@functools.lru_cache(maxsize=2)
def _loaded(model):
    from mlx_tokprune import load

    return load(model)


def run(rng: Random, place: Place) -> Outcome:
    model = rng.choice((TINY, POLICY))
    jobs = [_job(rng, model) for _ in range(2)]
    found = {}

    def work() -> None:
        found["alone"] = [job() for job in jobs]
        with ThreadPoolExecutor(2) as pool:
            many = [pool.submit(job) for job in jobs * 2]
            found["together"] = [one.result() for one in many]

    outcome = judge(call(work, place), [])
    if outcome.kind == "succeeded" and found["together"] != found["alone"] * 2:
        return Outcome("wrong", f"threads on {model.name}: {found}")
    return outcome


def _job(rng: Random, model) -> Callable[[], object]:
    """Return a function that gives an answer or an action as a comparable value."""
    from mlx_tokprune import Pruner, generate, predict_action

    ways = [way for way in WAYS if model == TINY or way[0] != "spatial"]
    pruner = Pruner(*rng.choice(ways))
    asked = (*_loaded(model), [str(PICTURES[model])], rng.choice(TEXTS))
    if model == TINY:
        return lambda: generate(*asked, pruner=pruner, max_tokens=6)
    return lambda: predict_action(*asked, pruner=pruner).values.tolist()
