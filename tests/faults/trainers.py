"""Group 11: damaged adapters of mlx-vlm's trainer and of peft."""

import json
import shutil
from pathlib import Path
from random import Random

from . import damage
from .asks import TINY, right
from .case import Outcome, Place, perform
from .learned import _bytes, _gone, _values

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
FILES = {
    "peft": ("adapter_config.json", "adapter_model.safetensors"),
    "peft-dora": ("adapter_config.json", "adapter_model.safetensors"),
    "mlx-vlm": ("adapter_config.json", "adapters.safetensors"),
    "mlx-vlm-old": ("adapter_config.json", "adapters.safetensors"),
}
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
CONFIGS = {
    "peft": PEFT | {"rank_pattern": {}, "bias": "none", "init_lora_weights": True},
    "peft-dora": PEFT | {"use_dora": True, "use_rslora": True},
    "mlx-vlm": {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.1},
    },
    "mlx-vlm-old": {"rank": 4, "alpha": 0.1, "dropout": 0.1},
}
FIELDS = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "peft_type", "lora_bias"),
    *("fan_in_fan_out", "fine_tune_type", "lora_parameters", "base_quantization"),
    *("rank", "alpha", "layer_replication", "trainable_token_indices"),
)


def prepare(base: Path) -> None:
    """Write an adapter of each kind for the tiny FastVLM."""
    import mlx.core as mx

    stored = mx.load(str(TINY / "model.safetensors"))
    for kind, (config, file) in FILES.items():
        folder, tensors = base / kind, {}
        folder.mkdir()
        (folder / config).write_text(json.dumps(CONFIGS[kind]))
        for layer in LAYERS:
            rows, columns = stored[f"{layer}.weight"].shape
            if kind.startswith("peft"):
                start = f"base_model.model.{layer}"
                tensors[f"{start}.lora_A.weight"] = mx.ones((4, columns)) * 0.1
                tensors[f"{start}.lora_B.weight"] = mx.ones((rows, 4)) * 0.1
                if "dora" in kind:
                    tensors[f"{start}.lora_magnitude_vector"] = mx.ones((rows,))
                continue
            parts = ("A", "B") if "old" in kind else ("lora_a", "lora_b")
            for part, shape in zip(parts, ((columns, 4), (4, rows)), strict=True):
                tensors[f"language_model.{layer}.{part}"] = mx.ones(shape) * 0.1
        mx.save_safetensors(str(folder / file), tensors)


def run(rng: Random, place: Place) -> Outcome:
    name = rng.choice(list(FILES))
    folder = place.folder / "adapter"
    shutil.copytree(place.base / name, folder)
    config, weights = (folder / file for file in FILES[name])
    fault = rng.choice(
        (_values, fields, fields, tensors, tensors, _bytes, _gone, swapped)
    )
    fault(rng, config, weights)
    command = rng.choice(("generate", "generate", "evaluate", "fuse"))
    argv = [*right(command, place), "--adapter-path", str(folder)]
    if command == "generate" and rng.random() < 0.3:
        argv[argv.index("--model") + 1] = str(place.base / "quantized")
    outcome = perform(command, argv, place)
    return Outcome(outcome.kind, f"{outcome.told}\n  {fault.__name__} of {name}")


# Faults -----------------------------------------------------------------------------


def fields(rng: Random, config: Path, weights: Path) -> None:
    """Set a field that a trainer could set, to a value that it may not have."""
    settings = json.loads(config.read_text())
    likely = (True, 2, 8.0, "all", "pissa", {"q_proj": 2}, {".*": 2}, ["norm"], "dora")
    value = rng.choice(likely) if rng.random() < 0.6 else damage.odd(rng)
    settings[rng.choice(FIELDS)] = value
    config.write_bytes(damage.as_json(settings))


def tensors(rng: Random, config: Path, weights: Path) -> None:
    """Remove, rename, cast, transpose, cut or spoil one tensor."""
    import mlx.core as mx

    stored = dict(mx.load(str(weights)))
    mx.eval(stored)
    name = rng.choice(sorted(stored))
    array = stored.pop(name)
    how = rng.randrange(7)
    if how == 1:
        new = rng.choice(
            (("layers.0", "layers.9"), ("q_proj", "k_proj"), ("model", "x"))
        )
        stored[name.replace(*new)] = array
    elif how == 2:
        stored[name] = array.astype(rng.choice((mx.int32, mx.uint8, mx.float16)))
    elif how == 3:
        stored[name] = array.T
    elif how == 4:
        stored[name] = array[: len(array) // 2]
    elif how == 5:
        stored[name] = array * rng.choice((float("nan"), float("inf"), 1e38, 0.0))
    elif how == 6:
        stored[name] = array.reshape(
            rng.choice(((-1,), (1, *array.shape), (*array.shape, 1)))
        )
    mx.save_safetensors(str(weights), stored)


def swapped(rng: Random, config: Path, weights: Path) -> None:
    """Take the settings of another trainer."""
    config.write_text(json.dumps(rng.choice(list(CONFIGS.values()))))
