"""Fine-tuning a language model under pruning: mlx-lm's LoRA and DoRA.

The adapter is a folder in mlx-lm's format: `adapter_config.json` and
`adapters.safetensors`, with names below `language_model`. A projector that was trained,
too, lies beside them.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.carried import carry, read_carried
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.loading import PROJECTOR, load, projector_of
from ..checkpoints.opening import Opened, open_checkpoint
from ..errors import InputError
from ..files import new_folder
from ..pipeline import tower_needs
from ..pipeline.planning import plan_for
from ..pruners import Pruner, Pruners
from .answers import AnswerLoss, check_trainable
from .batches import Batches
from .loop import Loop, Schedule, draw_losses, recomputed
from .samples import Samples, check_started


@dataclass(frozen=True)
class Adapter:
    """What is trained. layers: the last so many, all when `None`. dora: DoRA's form.

    projector: train that, too, whole.
    """

    rank: int = 8
    scale: float = 20.0
    layers: int | None = None
    dora: bool = False
    projector: bool = False

    def __post_init__(self):
        layers = 1 if self.layers is None else self.layers
        if min(self.rank, layers) < 1 or not 0 < self.scale <= 1e6:
            raise InputError("rank and layers are whole numbers from 1, scale above 0")

    def add_to(self, model) -> None:
        """Freeze a model and give its language model's layers adapters."""
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model.freeze()
        layers, parameters = self._config(model)
        language = model.language_model
        linear_to_lora_layers(language, layers, parameters, self.dora)
        for layer in model.mm_projector if self.projector else ():
            layer.set_dtype(mx.float32)  # steps are smaller than half precision can add
            layer.unfreeze()

    def _config(self, model) -> tuple[int, dict]:
        layers = self.layers or len(model.decoder.layers)
        return layers, {"rank": self.rank, "scale": self.scale, "dropout": 0.0}

    def save(self, model, folder: str | Path) -> None:
        """Write the adapter of `model` to a new folder."""
        layers, parameters = self._config(model)
        config = {
            "fine_tune_type": "dora" if self.dora else "lora",
            "num_layers": layers,
            "lora_parameters": parameters,
        }
        weights = dict(tree_flatten(model.language_model.trainable_parameters()))
        with new_folder(folder) as made:
            (made / "adapter_config.json").write_text(json.dumps(config, indent=2))
            mx.save_safetensors(str(made / "adapters.safetensors"), weights)
            if self.projector:
                mx.save_safetensors(str(made / PROJECTOR), projector_of(model))


def train_adapter(
    loaded: tuple,
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

    sizes: pictures of a batch, and questions about each. folder: keeps the state of the
    training, which goes on from there. checkpoint: see `recomputed`. distill:
    weight of the divergence from what the model answered before, with every token.
    dequantize: train on the values of quantized weights, which are the same function.
    """
    model, processor = loaded
    plan = plan_for(model, pruners)
    check_trainable(plan)
    if not 0 <= distill <= 1e6:
        raise InputError(f"distill {distill:g} is outside [0, 1e6]")
    settings = {**dataclasses.asdict(adapter), "plan": [_told(p) for p in plan]}
    settings |= {"positions": positions, "sizes": sizes, "distill": distill}
    mx.random.seed(schedule.seed)
    if dequantize:
        replace_quantized(model)
    teacher = copy.deepcopy(model) if distill else None  # weights are shared
    adapter.add_to(model)
    batches = Batches(model, processor, samples.items, tower_needs(plan))
    loss = AnswerLoss(model, batches, plan, positions, sizes, distill, teacher)
    module = model if adapter.projector else model.language_model
    check_started(folder, model, samples, settings | {"dequantize": dequantize})
    loop = Loop(module, loss, schedule, folder)
    with recomputed(model, checkpoint):
        loop.run()
    if loop.is_first:
        adapter.save(model, output)
        draw_losses(loop.losses, folder / "loss.png")


def _told(pruner: Pruner) -> list[str]:
    """What tells a pruner apart, the weights of its scorer among it."""
    scorer = [fingerprint(pruner.scorer)] if pruner.scorer is not None else []
    return [repr(pruner), *scorer]


def replace_quantized(model) -> None:
    """Put the values of quantized weights in their place."""
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

    In the layout of `convert`, which mlx-vlm loads; quantized weights stay quantized.
    """
    opened = open_checkpoint(source)
    model, _ = load(source, adapter_path=adapter)
    merged = {}
    for tensors in fused_modules(model).values():
        merged |= tensors
    if (Path(adapter) / PROJECTOR).is_file():
        merged |= projector_of(model)
    write_fused(opened, merged, Path(output))


def fused_modules(model) -> dict[str, dict[str, mx.array]]:
    """Modules of the language model with an adapter: the tensors with it in them."""
    found = {}
    for path, module in model.language_model.named_modules():
        if hasattr(module, "fuse"):
            path = f"language_model.{path}"
            tensors = tree_flatten(module.fuse().parameters())
            found[path] = {f"{path}.{name}": array for name, array in tensors}
    return found


def write_fused(opened: Opened, merged: dict[str, mx.array], output: Path) -> None:
    """The checkpoint with these tensors in the place of its own."""
    from ..checkpoints.shards import copy_companions, write_config, write_shards

    family, checkpoint, config = opened
    weights = family.to_mlx_layout(checkpoint.load())
    unknown = sorted(merged.keys() - weights.keys())
    if unknown:
        raise InputError(f"the checkpoint has no tensor {unknown[0]} to fuse into")

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
