"""Fine-tuning a language model under pruning: mlx-lm's LoRA and DoRA.

The adapter is a folder in mlx-lm's format: `adapter_config.json` and
`adapters.safetensors`, with names below `language_model`. A trained projector is a
third file of that folder.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.adapter import PROJECTOR, projector_of, trains_projector
from ..checkpoints.carried import carry, read_carried
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.loading import load
from ..checkpoints.opening import ModelSource, open_checkpoint
from ..errors import InputError, nearest
from ..files import new_folder, write_arrays
from ..models.protocol import VisionModel
from ..pipeline import tower_needs
from ..pipeline.planning import plan_for
from ..processing.processor import AnyProcessor, check_answers
from ..pruners import Pruner, Pruners
from .answers import answer_loss, check_trainable
from .batches import Batches
from .loop import Loop, Schedule, draw_losses, recomputed
from .samples import Samples, check_started


@dataclass(frozen=True)
class Adapter:
    """Shape of an adapter, and the weights that are trained.

    rank, scale: of each low-rank product. layers: number of last layers that get an
    adapter, all when `None`. dora: DoRA in place of LoRA. projector: train all weights
    of the projector, too. Raises `InputError` for a value out of range.
    """

    rank: int = 8
    scale: float = 20.0
    layers: int | None = None
    dora: bool = False
    projector: bool = False

    def __post_init__(self):
        layers = 1 if self.layers is None else self.layers
        if min(self.rank, layers) < 1 or not 0 < self.scale <= 1e6:
            raise InputError(
                f"rank {self.rank}, layers {layers} or scale {self.scale:g} is out of "
                "range; rank and layers are whole numbers from 1, scale is in (0, 1e6]"
            )

    def add_to(self, model: VisionModel) -> None:
        """Freeze a model, and add adapters to the layers of its language model."""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model.freeze()
        layers, parameters = self._config(model)
        language = model.language_model
        linear_to_lora_layers(language, layers, parameters, self.dora)
        for layer in model.mm_projector if self.projector else ():
            layer.set_dtype(mx.float32)  # steps are smaller than half precision can add
            layer.unfreeze()

    def _config(self, model: VisionModel) -> tuple[int, dict]:
        layers = self.layers or len(model.decoder.layers)
        return layers, {"rank": self.rank, "scale": self.scale, "dropout": 0.0}

    def save(self, model: VisionModel, folder: str | Path) -> None:
        """Write the adapter of `model` to a new folder, in mlx-lm's format."""
        layers, parameters = self._config(model)
        config = {
            "fine_tune_type": "dora" if self.dora else "lora",
            "num_layers": layers,
            "lora_parameters": parameters,
        }
        weights = dict(tree_flatten(model.language_model.trainable_parameters()))
        with new_folder(folder) as made:
            (made / "adapter_config.json").write_text(json.dumps(config, indent=2))
            write_arrays(made / "adapters.safetensors", weights)
            if self.projector:
                write_arrays(made / PROJECTOR, projector_of(cast(nn.Module, model)))


def train_adapter(
    loaded: tuple[VisionModel, AnyProcessor],
    samples: Samples,
    pruners: Pruners,
    positions: str,
    adapter: Adapter,
    sizes: tuple[int, int],
    schedule: Schedule,
    folder: Path,
    output: Path,
    checkpoint: bool = False,
    distill: float = 0.0,
    dequantize: bool = False,
) -> None:
    """Train an adapter for a `(model, processor)` under pruning; write it to `output`.

    positions: "original" or "contiguous". sizes: pictures of a batch, and questions
    about each. folder: state of the training, from which it is resumed. checkpoint: see
    `recomputed`. distill: weight of the divergence from the answers of the model before
    training, with every token. dequantize: train on the values of quantized weights;
    the function of the model is unchanged. Raises `InputError` for a plan or a setting
    that cannot be trained.
    """
    model, processor = loaded[0], check_answers(loaded[1])
    plan = plan_for(model, pruners)
    check_trainable(plan)
    if not 0 <= distill <= 1e6:
        raise InputError(f"distill {distill:g} is outside [0, 1e6]")
    settings = {**dataclasses.asdict(adapter), "plan": [_identity(p) for p in plan]}
    settings |= {"positions": positions, "sizes": sizes, "distill": distill}
    mx.random.seed(schedule.seed)
    if dequantize:
        replace_quantized(model)
    teacher = copy.deepcopy(model) if distill else None  # weights are shared
    adapter.add_to(model)
    batches = Batches(model, processor, samples.items, tower_needs(plan))
    loss = answer_loss(model, batches, plan, positions, sizes, distill, teacher)
    module = model if adapter.projector else model.language_model
    check_started(folder, model, samples, settings | {"dequantize": dequantize})
    loop = Loop(cast(nn.Module, module), loss, schedule, folder)
    with recomputed(model, checkpoint):
        loop.run()
    if loop.is_first:
        adapter.save(model, output)
        draw_losses(loop.losses, folder / "loss.png")


def _identity(pruner: Pruner) -> list[str]:
    """Return the notation of a pruner, and the hash of its scorer's weights."""
    scorer = [fingerprint(pruner.scorer)] if pruner.scorer is not None else []
    return [repr(pruner), *scorer]


def replace_quantized(model: VisionModel) -> None:
    """Replace the language model's quantized weights by their values.

    Raises `InputError` for a model without quantized weights.
    """
    from mlx_lm.utils import dequantize_model

    language = model.language_model
    if not any(hasattr(module, "bits") for module in language.modules()):
        raise InputError(
            "the checkpoint has no quantized weights; leave out --dequantize"
        )
    dequantize_model(language)
    mx.eval(language.parameters())


def fuse(source: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Write a checkpoint whose language model has the adapter in its weights.

    The layout is that of `convert`, which mlx-vlm loads; quantized weights stay
    quantized. Raises `InputError` where the adapter does not fit the checkpoint.
    """
    opened = open_checkpoint(source)
    model, _ = load(source, adapter_path=adapter)
    merged = {}
    for tensors in fused_modules(model).values():
        merged |= tensors
    if trains_projector(Path(adapter)):
        merged = projector_of(cast(nn.Module, model)) | merged
    write_fused(opened, merged, Path(output))


def fused_modules(model: VisionModel) -> dict[str, dict[str, mx.array]]:
    """Return the tensors of each module with an adapter, merged, by module name."""
    fused = {}
    for path, module in cast(nn.Module, model).named_modules():
        if hasattr(module, "fuse"):
            tensors = tree_flatten(module.fuse().parameters())
            fused[path] = {f"{path}.{name}": array for name, array in tensors}
    return fused


def write_fused(opened: ModelSource, merged: dict[str, mx.array], output: Path) -> None:
    """Write a checkpoint to `output`, with `merged` in place of its own tensors.

    Raises `InputError` for a merged tensor that the checkpoint does not have.
    """
    from ..checkpoints.shards import copy_companions, write_config, write_shards

    family, checkpoint, config = opened
    weights = family.to_mlx_layout(checkpoint.load())
    unknown = sorted(merged.keys() - weights.keys())
    if unknown:
        raise InputError(
            f"the checkpoint has no tensor {unknown[0]} to fuse into; expected an "
            f"adapter of this model.{nearest(unknown[0], weights)}"
        )

    for path, format in checkpoint.quantization.formats.items():
        array = merged.get(f"{path}.weight")
        if array is not None and mx.issubdtype(array.dtype, mx.floating):
            merged = merged | format.pack(path, array)

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for name in sorted(weights):
            array = weights.pop(name)
            yield name, merged.get(name, array).astype(array.dtype)

    size = sum(array.nbytes for array in weights.values())
    with new_folder(output) as folder:
        copy_companions(checkpoint.folder, folder)
        kept = {k: v for k, v in config.items() if k != "auto_map"}
        pruners = read_carried(config, checkpoint.folder)
        write_config(folder, carry(pruners, kept, folder))
        write_shards(folder, tensors(), size)
