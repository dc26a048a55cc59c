"""Count Metal launches, bytes and FLOPs without a Mac: ours beside mlx-vlm's.

    pip install -e '.[parity]'
    python benchmarks/metal_cost.py FOLDER

FOLDER is a converted FastVLM. For each stage up to the first token: kernel launches of
the graph as written and under `mx.compile`, bytes that launches read and write, and
FLOPs. The counts model Metal (`mlx_tokprune.measure.cost`) and are no measurement: they
show a change that is faster on this machine but slower on a Mac.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx_tokprune
from mlx_tokprune.measure.cost import VIEWS, Cost, as_on_metal, count
from mlx_tokprune.models.language import TokenSequence

import mlx.core as mx  # isort: skip

PROMPT = 32  # tokens of text


def our_stages(folder: Path) -> dict:
    model, _ = mlx_tokprune.load(folder)

    def prefill(embeddings):
        sequence = TokenSequence(embeddings, None, embeddings.shape[1])
        read = model.decoder.read(sequence, model.decoder.make_cache())
        return model.decoder.logits(read.hidden)

    return {
        "vision": [lambda pixels: model.encode(pixels).tokens],
        "project": [model.project],
        "prefill": [prefill],
    }, model


def their_stages(folder: Path) -> dict:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    model = load_model(folder)

    def vision(pixels):
        return model.vision_tower(pixels)[1]

    def language(embeddings, cache=None):
        ids = mx.zeros(embeddings.shape[:2], mx.int32)
        given = {"inputs_embeds": embeddings, "cache": cache}
        return model.language_model(ids, **given).logits

    def all_but_the_last(embeddings):
        cache = make_prompt_cache(model.language_model)
        language(embeddings[:, :-1], cache)
        return [array for layer in cache for array in (layer.keys, layer.values)]

    def the_last(embeddings):
        return language(embeddings[:, -1:])

    return {
        "vision": [vision],
        "project": [model.mm_projector],
        "prefill": [all_but_the_last, the_last],
    }


def launches_compiled(function: Callable, *arrays: mx.array) -> int:
    """Return the launches of `function(*arrays)` under `mx.compile`, with fusion."""
    with as_on_metal(), tempfile.TemporaryDirectory() as folder:
        outputs = mx.compile(function)(*arrays)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        output_names = _names(outputs, Path(folder) / "graph.dot")
        # Inputs that are not evaluated bring operations of their own.
        input_names = _names(arrays, Path(folder) / "inputs.dot")
    return len(output_names) - len(input_names)


def _names(arrays: Sequence[mx.array], file: Path) -> list[str]:
    """Return the operations that compute these arrays, without views."""
    mx.export_to_dot(str(file), *arrays)
    labels = re.findall(r'label ="(\w+)"', file.read_text())
    return [name for name in labels if name not in VIEWS]


def line(name: str, functions: list, given: mx.array) -> str:
    """Return the table row of a stage, with the costs of its calls added up."""
    cost = sum((count(function, given) for function in functions), Cost())
    fused = sum(launches_compiled(function, given) for function in functions)
    return (
        f"{name:16}{cost.launches:10}{fused:10}{cost.bytes / 1e6:12.1f}"
        f"{cost.weights / 1e6:12.1f}{cost.flops / 1e9:12.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    ours, model = our_stages(args.folder)
    theirs = their_stages(args.folder)
    pixels = mx.zeros((1, model.image_size, model.image_size, 3))
    features = model.encode(pixels).tokens
    _, tokens, channels = features.shape
    hidden = model.args.text["hidden_size"]
    given = {
        "vision": pixels,
        "project": mx.zeros((1, tokens, channels)),
        "prefill": mx.zeros((1, tokens + PROMPT, hidden)),
    }
    print(f"MLX {mx.__version__}, {tokens} visual tokens and {PROMPT} of text, float32")
    print(
        f"{'':16}{'launches':>10}{'compiled':>10}{'MB moved':>12}{'MB weights':>12}"
        f"{'GFLOP':>12}"
    )
    for stage, array in given.items():
        print(line(f"{stage}, ours", ours[stage], array))
        print(line(f"{stage}, mlx-vlm", theirs[stage], array))


if __name__ == "__main__":
    main()
