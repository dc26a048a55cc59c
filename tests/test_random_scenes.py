"""Drawn combinations of model, plan, positions, batch and counts, pruned and masked.

The other side is written here from mlx-lm's layers alone: it reads the whole prompt of
each sample with a mask over what each place dropped, and numbers the tokens in NumPy.
"""

import dataclasses
import random

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_CHUNKS, TINY_POLICY

from mlx_tokprune import Pruner, load
from mlx_tokprune.models.positions import LayerCache
from mlx_tokprune.pipeline import POSITIONS, Scene, planning, run
from mlx_tokprune.processing.prompt import Prompt

AFTER = 3  # tokens that follow the prompt
DRAWS = 24  # of each model
AT_TOWER = ("norm", "mean_similarity", "divprune", "random")  # none that merges
AT_PROMPT = ("cdpruner", "dart", "trimvla", "vlapruner")
OWN_COUNT = ("trimvla", "lightvla")
IN_LAYERS = ("fastv", "norm", "dart")
FOLDERS = {
    "fastvlm": TINY,
    "openvla": TINY_POLICY,
    "lerobot": TINY_CHUNKS,
    "openpi": TINY_CHUNKS,
}


@pytest.fixture(scope="module", params=FOLDERS)
def model(request):
    model, _ = load(FOLDERS[request.param])
    if request.param == "openpi":
        model.args = dataclasses.replace(model.args, dialect="openpi")
    return model


def draw_plan(draw: random.Random, depth: int) -> list[Pruner]:
    """Return a pruner at the tower, the prompt and up to two layers, or at fewer."""
    plan = []

    def ratio() -> float:
        return draw.choice([0.3, 0.5, 0.8])

    if draw.random() < 0.5:
        plan.append(Pruner(draw.choice(AT_TOWER), ratio()))
    if draw.random() < 0.4:
        plan.append(Pruner(draw.choice(AT_PROMPT), ratio()))
    elif draw.random() < 0.5:
        return [*plan, Pruner(draw.choice(OWN_COUNT))]
    count = draw.choice([0, 0, 1, min(2, depth - 1)])
    layers = sorted(draw.sample(range(1, depth), count))
    return plan + [Pruner(draw.choice(IN_LAYERS), ratio(), at=at) for at in layers]


def draw_scene(draw: random.Random, model) -> Scene:
    size, batch, places = model.image_size, draw.choice([1, 2, 3]), 1
    pictures = model.pictures or draw.choice([1, 2])
    if model.answers == "text":
        places, pictures = draw.choice([1, 2]), 1
    noise = np.random.default_rng(draw.randrange(1000))
    pixels = noise.random((batch * places * pictures, size, size, 3), np.float32)
    lengths = [draw.choice([1, 4, 9]) for _ in range(places + 1)]
    if model.attends == "prefix":
        lengths[0] = 0
    segments = [tuple(draw.randrange(3, 90) for _ in range(n)) for n in lengths]
    return Scene(mx.array(pixels), Prompt(tuple(segments)), batch)


def masked(model, scene: Scene, sample: int, visual, positions: str, after: mx.array):
    """Return the states (1 + L, D) of the prompt's last token and the L after it."""
    texts, places = model.text(scene.prompt), scene.prompt.places
    pictures = len(scene.pixels) // scene.batch
    pixels = scene.pixels[sample * pictures : (sample + 1) * pictures]
    tokens = model.project(model.encode(pixels).tokens)
    tokens = tokens.reshape(places, -1, tokens.shape[-1])
    parts, is_visual = [], []
    for number, text in enumerate(texts):
        parts.append(text[0])
        is_visual += [False] * text.shape[1]
        if number < places:
            parts.append(tokens[number].astype(text.dtype))
            is_visual += [True] * tokens.shape[1]
    length = len(is_visual)
    columns = np.flatnonzero(is_visual).reshape(places, -1)
    parts.append(model.decoder.embed(after)[0])
    hidden = mx.concatenate(parts)[None]
    visible = np.ones(length + after.shape[1], bool)
    choices = dict(visual.choices)
    if "tower" in choices or "prompt" in choices:
        groups = slice(sample * places, (sample + 1) * places)
        kept = np.array(visual.indices)[groups]
        real = np.ones(kept.shape, bool)
        if visual.mask is not None:
            real = np.array(visual.mask)[groups]
        remaining = np.take_along_axis(columns, kept, axis=1)[real]
        visible[columns.reshape(-1)] = False
        visible[remaining] = True
    else:
        remaining = columns.reshape(-1)
    causal = np.tri(len(visible), dtype=bool)
    if model.attends == "prefix":
        causal[:length, :length] = True
    for number, layer in enumerate(model.decoder.layers):
        if number in choices:
            visible[remaining] = False
            remaining = remaining[np.array(choices[number])[sample]]
            visible[remaining] = True
        where = np.arange(len(visible))
        if positions == "contiguous":
            where = np.cumsum(visible) - 1
        where[length:] += model.gap
        mask = mx.array(causal & visible)[None, None]
        hidden = layer(hidden, mask, LayerCache(None, 0, mx.array(where)))
    return model.decoder.norm(hidden)[0, length - 1 :]


@pytest.mark.parametrize("number", range(DRAWS))
def test_pruned_equals_masked(model, number):
    draw = random.Random(f"{number} {type(model).__name__} {model.gap}")
    scene, positions = draw_scene(draw, model), POSITIONS[number % 2]
    layers = model.decoder.layers
    plan = planning.plan_for(model, draw_plan(draw, len(layers)))
    cache = model.decoder.make_cache()
    step = draw.choice([5, 512])
    read, visual = run(model, scene, plan, positions=positions, cache=cache, step=step)
    ids = [[draw.randrange(3, 90) for _ in range(AFTER)] for _ in range(scene.batch)]
    after = mx.array(ids)
    followed = model.decoder.follow(after, read.cache)
    states = mx.concatenate([read.hidden, followed], axis=1)
    for sample in range(scene.batch):
        rows = after[sample : sample + 1]
        expected = masked(model, scene, sample, visual, positions, rows)
        largest = mx.max(mx.abs(expected)).item()
        error = mx.max(mx.abs(states[sample] - expected)).item()
        assert error < 1e-4 * largest, (plan, positions, scene.batch, sample)
