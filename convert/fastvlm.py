"""FastVLM checkpoints: which layout a folder has, and its tensors in the MLX layout.

Reads Apple's PyTorch layout and the MLX community's; writes the latter, which mlx-vlm
loads too. Dicts of arrays in, dicts of arrays out.
"""

import re
from collections.abc import Iterable

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError
from ..models.fastvlm import FastVLM, ModelArgs
from .checkpoint import FLOATS, Checkpoint, check_shapes

READS = (
    "this reads FastVLM as Apple's PyTorch checkpoints (apple/FastVLM-0.5B, -1.5B, "
    "-7B) or as MLX checkpoints (such as mlx-community/FastVLM-0.5B-bf16)"
)
_TOWER = "vision_tower.vision_model"

# Apple's PyTorch names -> MLX names, tried in order; `None` drops the tensor.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r".*\.num_batches_tracked$", None),
    (r".*\.rotary_emb\.inv_freq$", None),
    (
        r"^model\.vision_tower\.vision_tower\.model\.patch_embed\.",
        f"{_TOWER}.patch_embed.blocks.",
    ),
    (r"^model\.vision_tower\.vision_tower\.model\.", f"{_TOWER}."),
    (r"^model\.mm_projector\.", "mm_projector."),
    (r"^(model\.|lm_head\.)", r"language_model.\1"),
)
# Carried along when present, used by no visual token.
_OPTIONAL = re.compile(rf"^{re.escape(_TOWER)}\.head\.")


def is_torch_layout(names: Iterable[str]) -> bool:
    return any(n.startswith("model.vision_tower.vision_tower.") for n in names)


def check_layout(checkpoint: Checkpoint) -> None:
    """Return when the layout can be read; else `InputError` says what was found."""
    names = checkpoint.tensors
    if is_torch_layout(names) or any(n.startswith(f"{_TOWER}.") for n in names):
        return
    model_type = checkpoint.config.get("model_type")
    if list(checkpoint.folder.glob("*.mlpackage")) or any(
        n.startswith("multi_modal_projector.") for n in names
    ):
        found = "Apple's MLX export, whose vision tower is a Core ML package"
    elif model_type == "fast_vlm" or any(".timm_model." in n for n in names):
        found = "a transformers fast_vlm checkpoint, whose tower has timm's names"
    elif any(n.startswith("vision_backbone.") for n in names):
        found = "a Prismatic (OpenVLA) checkpoint"
    else:
        found = f"a checkpoint of model type {model_type!r} without a FastViTHD tower"
    raise InputError(f"{checkpoint.folder} is {found}; {READS}")


def rename(name: str) -> str | None:
    """A PyTorch-layout name in the MLX layout; `None` for tensors that are dropped."""
    for pattern, replacement in _KEYS:
        if re.match(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    return name


def _axes(name: str, ndim: int) -> tuple[int, ...] | None:
    """How a PyTorch-layout tensor is transposed, by its MLX name."""
    if name.startswith(_TOWER) and ndim == 4:
        return (0, 2, 3, 1)  # channels-last convolutions
    if ".layer_scale" in name and ndim == 3:
        return (1, 2, 0)
    return None


def mlx_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes that `to_mlx_layout` will give, from the headers alone."""
    torch_layout = is_torch_layout(checkpoint.tensors)
    shapes = {}
    for name, tensor in checkpoint.tensors.items():
        new = rename(name) if torch_layout else name
        if new is None:
            continue
        shape, axes = tensor.shape, _axes(new, len(tensor.shape))
        if torch_layout and axes:
            shape = tuple(shape[a] for a in axes)
        shapes[new] = shape
    return shapes


def to_mlx_layout(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of either layout -> the MLX layout. Lazy and idempotent."""
    if not is_torch_layout(weights):
        return weights
    renamed = {}
    for name, array in weights.items():
        new = rename(name)
        if new is not None:
            axes = _axes(new, array.ndim)
            renamed[new] = array.transpose(*axes) if axes else array
    return renamed


def expected_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the MLX layout for this `config.json`, with its shape."""
    args = ModelArgs.from_dict(config)
    try:
        model = FastVLM(args, inference=False)
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as e:
        raise InputError(f"config.json does not describe a FastVLM ({e})") from None
    return {name: array.shape for name, array in tree_flatten(model.parameters())}


def read_config(checkpoint: Checkpoint) -> dict:
    """The config, with what the tensors say where published configs are wrong.

    Raises `InputError` unless the layout is one that can be read and every tensor is
    there once, with its shape.
    """
    check_layout(checkpoint)
    shapes = mlx_shapes(checkpoint)
    config = dict(checkpoint.config)
    ModelArgs.from_dict(config)
    tied = "language_model.lm_head.weight" not in shapes
    config["tie_word_embeddings"] = tied
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": tied}
    head = shapes.get(f"{_TOWER}.head.proj")
    if head is not None and head[-1] != 768:
        # mlx-vlm builds this unused head 768 wide unless the config says otherwise.
        vision = config.get("vision_config") or {}
        config["vision_config"] = vision | {"projection_dim": head[-1]}
    _check_shapes(checkpoint, shapes, config)
    return config


def _check_shapes(checkpoint: Checkpoint, found: dict, config: dict) -> None:
    expected = expected_shapes(config)
    found = {k: v for k, v in found.items() if not _OPTIONAL.match(k)}
    dtypes = mlx_dtypes(checkpoint)
    quantized = [
        path
        for path in (n.removesuffix(".scales") for n in found if n.endswith(".scales"))
        if path.startswith("language_model.")
        and len(expected.get(f"{path}.weight", ())) == 2
    ]
    if quantized:
        bits, group = _quantization(checkpoint, config)
    else:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    for path in quantized:
        rows, columns = expected[f"{path}.weight"]
        expected[f"{path}.weight"] = (rows, columns * bits // 32)
        expected[f"{path}.scales"] = (rows, columns // group)
        expected[f"{path}.biases"] = (rows, columns // group)
    source = str(checkpoint.folder)
    if is_torch_layout(checkpoint.tensors):
        source += ", in the MLX layout,"
    check_shapes(found, expected, source)
    packed = {f"{path}.weight" for path in quantized}
    for name, dtype in dtypes.items():
        right = dtype == "U32" if name in packed else dtype in FLOATS
        if not right:
            raise InputError(
                f"tensor {name} of {checkpoint.folder} has type {dtype}; expected "
                f"{'U32, as it is quantized' if name in packed else ', '.join(FLOATS)}"
            )


def mlx_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """The stored safetensors type of each tensor, by its MLX-layout name."""
    torch_layout = is_torch_layout(checkpoint.tensors)
    names = {n: rename(n) if torch_layout else n for n in checkpoint.tensors}
    return {new: checkpoint.tensors[n].dtype for n, new in names.items() if new}


def _quantization(checkpoint: Checkpoint, config: dict) -> tuple[int, int]:
    """(bits, group size) that config.json gives for the language model."""
    given = config.get("quantization")
    given = given if isinstance(given, dict) else {}
    bits, group = given.get("bits"), given.get("group_size")
    affine = given.get("mode", "affine") == "affine"
    if not affine or bits not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128):
        raise InputError(
            f"{checkpoint.folder} has quantized tensors, but its config.json gives "
            f"{bits} bits and group_size {group}; expected 2 to 8 bits in groups of "
            "32, 64 or 128, mode affine"
        )
    return bits, group
