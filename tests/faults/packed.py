"""Group 10: checkpoints quantized as mlx-vlm does, with formats that do not fit."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from random import Random

from . import damage
from .asks import TINY, right
from .case import Outcome, Place, module_of, perform

MODES = {
    "affine": (32, 4, "affine"),
    "affine-3": (64, 3, "affine"),
    "mxfp4": (32, 4, "mxfp4"),
    "nvfp4": (16, 4, "nvfp4"),
    "mxfp8": (32, 8, "mxfp8"),
    "mixed": (32, 4, "affine"),
}
FIELDS = ("group_size", "bits", "mode")
SECTIONS = ("quantization", "quantization_config")
LAYERS = (
    *("language_model.model.layers.0.mlp.down_proj", "mm_projector.0", "lm_head"),
    *("model.layers.1.self_attn.q_proj", "vision_tower.vision_model", "x" * 5000),
)
# Errors of a second fault where the first one left nothing to damage.
UNDAMAGEABLE = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)
PARTS = ("weight", "scales", "biases")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def prepare(base: Path) -> None:
    """Write a checkpoint of each kind, and the answers of all of them."""
    import mlx.core as mx

    with contextlib.redirect_stdout(io.StringIO()):
        module_of("convert").main(["--hf-path", str(TINY), "--mlx-path", "floats"])
    answers, place = {}, Place.make(base / "packed-place", base)
    for kind, format in MODES.items():
        folder = base / f"packed-{kind}"
        shutil.copytree(base / "floats", folder)
        section = dict(zip(FIELDS, format, strict=True))
        weights = dict(mx.load(str(folder / WEIGHTS)))
        for name in sorted(weights):
            path, array = name.removesuffix(".weight"), weights[name]
            ours = path.startswith(("language_model.", "mm_projector."))
            if (
                not ours
                or name == path
                or array.ndim != 2
                or array.shape[1] % format[0]
            ):
                continue
            own = (32, 8, "affine") if kind == "mixed" and "down" in name else format
            if own != format:
                section[path] = dict(zip(FIELDS, own, strict=True))
            parts = mx.quantize(array, *own)
            weights |= dict(zip((f"{path}.{p}" for p in PARTS), parts, strict=False))
        mx.eval(weights)
        (folder / WEIGHTS).unlink()
        mx.save_safetensors(str(folder / WEIGHTS), weights)
        _edit(folder, lambda c, s=section: c.update(dict.fromkeys(SECTIONS, s)))
        answers[kind] = _answer(folder, place)
    (base / "packed-answers.json").write_text(json.dumps(answers))


def _answer(folder: Path, place: Place) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        module_of("generate").main(right("generate", place, folder))
    return text_of(out.getvalue())


def text_of(out: str) -> str:
    return out.partition("visual tokens ")[0]


def _edit(folder: Path, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_bytes(damage.as_json(config))


def run(rng: Random, place: Place) -> Outcome:
    kind = rng.choice(list(MODES))
    folder = place.folder / "model"
    shutil.copytree(place.base / f"packed-{kind}", folder)
    faults = rng.choices(list(FAULTS), list(FAULTS.values()), k=rng.choice((1, 1, 2)))
    for fault in faults:
        with contextlib.suppress(*UNDAMAGEABLE):
            fault(rng, folder)
    command = rng.choice(("generate", "generate", "generate", "convert", "evaluate"))
    check = None
    if command == "generate" and not {*faults} & {tensors, values, data}:
        expected = json.loads((place.base / "packed-answers.json").read_text())[kind]
        check = lambda out: (  # noqa: E731
            None if text_of(out) == expected else f"{text_of(out)!r}, not {expected!r}"
        )
    argv = right(command, place, folder)
    if command == "convert":
        argv += rng.choice(
            ([], ["-q"], ["--dtype", "float16"], ["--dtype", "bfloat16"])
        )
    outcome = perform(command, argv, place, check)
    names = [fault.__name__ for fault in faults]
    return Outcome(outcome.kind, f"{outcome.told}\n  {names} of {kind}")


# Faults -----------------------------------------------------------------------------


def _section(rng: Random, folder: Path, change) -> None:
    """Change one of the two equal sections, or both."""
    names = rng.choice((SECTIONS, SECTIONS, SECTIONS[:1], SECTIONS[1:]))

    def apply(config):
        for name in names:
            config[name] = change(config[name])

    _edit(folder, apply)


def sizes(rng: Random, folder: Path) -> None:
    values = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 0, -4, 4.0, "4", None, [4])
    modes = (*("affine", "mxfp4", "nvfp4", "mxfp8"), "x", None, ["affine"], {})
    field = rng.choice(FIELDS)
    value = rng.choice(modes if field == "mode" else values)
    _section(rng, folder, lambda section: section | {field: value})


def layers(rng: Random, folder: Path) -> None:
    """Add an entry of a layer, often under another name of it."""
    path = rng.choice(LAYERS)
    entry = rng.choice((True, False, {}, {"bits": 8}, {"mode": "mxfp4"}, {"bits": "4"}))
    entry = rng.choice((entry, entry, damage.odd(rng)))
    _section(rng, folder, lambda section: section | {path: entry})


def section(rng: Random, folder: Path) -> None:
    _section(rng, folder, lambda old: damage.changed(rng, old, rng.choice((1, 2))))


def methods(rng: Random, folder: Path) -> None:
    other = {"quant_method": rng.choice(("awq", "gptq", "bitsandbytes", 7, None))}
    _section(rng, folder, lambda old: rng.choice((other, None, other | old)))


def tensors(rng: Random, folder: Path) -> None:
    """Remove, rename, cast, cut, transpose or exchange one packed tensor."""
    import mlx.core as mx

    weights = dict(mx.load(str(folder / WEIGHTS)))
    mx.eval(weights)
    paths = [n.removesuffix(".scales") for n in weights if n.endswith(".scales")]
    name = f"{rng.choice(paths)}.{rng.choice(PARTS)}"
    array = weights.pop(name)
    other = f"{rng.choice(paths)}.{rng.choice(PARTS)}"
    how = rng.randrange(8)
    if how == 1:
        weights[name + "x"] = array
    elif how == 2:
        weights[name] = array.astype(rng.choice((mx.float32, mx.int32, mx.uint8)))
    elif how == 3:
        weights[name] = array[:, : array.shape[1] // 2]
    elif how == 4:
        weights[name] = array.T
    elif how == 5 and other in weights:
        weights[name], weights[other] = weights[other], array
    elif how == 6:
        weights[name] = array.reshape(rng.choice(((-1,), (1, 1, *array.shape))))
    elif how == 7:
        weights[name] = mx.zeros((0, array.shape[1]), array.dtype)
    mx.eval(weights)
    (folder / WEIGHTS).unlink()
    mx.save_safetensors(str(folder / WEIGHTS), weights)


def values(rng: Random, folder: Path) -> None:
    """Fill the scales of a layer with a number that is no scale."""
    import mlx.core as mx

    weights = dict(mx.load(str(folder / WEIGHTS)))
    mx.eval(weights)
    name = rng.choice([n for n in weights if n.endswith((".scales", ".biases"))])
    numbers = (float("nan"), float("inf"), 0.0, 255.0, 3e38)
    number = mx.array(rng.choice(numbers))
    if weights[name].dtype == mx.uint8:
        number = mx.array(rng.choice((0, 127, 255)), mx.uint8)
    weights[name] = mx.broadcast_to(
        number.astype(weights[name].dtype), weights[name].shape
    )
    mx.eval(weights)
    (folder / WEIGHTS).unlink()
    mx.save_safetensors(str(folder / WEIGHTS), weights)


def data(rng: Random, folder: Path) -> None:
    file = folder / rng.choice((CONFIG, WEIGHTS))
    file.write_bytes(damage.damaged(rng, file.read_bytes(), 2000))


FAULTS = {sizes: 5, layers: 5, section: 5, methods: 2, tensors: 6, values: 2, data: 2}
