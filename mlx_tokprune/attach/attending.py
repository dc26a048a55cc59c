"""Attention of the towers of mlx-vlm's families, and the patches of each token.

Each family is a `Tower`, for `attention.Watch`.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from .attention import Heads, Tower

Tokens = Callable[[Any, mx.array, Mapping], mx.array]

# Queries and keys -------------------------------------------------------------------


def _in_heads(x: mx.array, heads: int) -> mx.array:
    """Reshape (B, L, H * D) -> (B, H, L, D)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _projected(name: str) -> Callable[..., Heads]:
    """Return `heads` for separate matrices of queries and keys (SigLIP, CLIP)."""

    def heads(module: Any, arguments: Mapping, inputs: Mapping, config: Any) -> Heads:
        queries, keys = module.q_proj(arguments[name]), module.k_proj(arguments[name])
        q, k = (_in_heads(array, module.num_heads) for array in (queries, keys))
        return Heads(q, k, keys, module.scale, [keys.shape[1]])

    return heads


def _qwen(module: Any, arguments: Mapping, inputs: Mapping, config: Any) -> Heads:
    """Return heads of a joint matrix with rotary positions; frames are concatenated."""
    x, count = arguments["x"], module.num_heads
    joint = module.qkv(x).reshape(1, len(x), 3, count, -1)
    queries, keys = joint[:, :, 0], joint[:, :, 1]
    turn, angles = _beside(module, "apply_rotary_pos_emb_vision"), "rotary_pos_emb"
    q, k = (turn(a, arguments[angles]).swapaxes(1, 2) for a in (queries, keys))
    ends = arguments["cu_seqlens"].tolist()[1:]
    return Heads(q, k, keys.flatten(2), module.scale, ends)


def _intern(module: Any, arguments: Mapping, inputs: Mapping, config: Any) -> Heads:
    """Return heads of a joint matrix, with norms over all heads."""
    x = arguments["x"]
    queries, keys, _ = mx.split(module.qkv(x), 3, axis=-1)
    if module.qk_normalization:
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    q, k = (_in_heads(array, module.num_heads) for array in (queries, keys))
    return Heads(q, k, keys, module.scale, [x.shape[1]])


def _fastvit(module: Any, arguments: Mapping, inputs: Mapping, config: Any) -> Heads:
    """Return heads of a joint matrix; patches are a grid (B, h, w, C)."""
    x = arguments["x"].flatten(1, 2)
    queries, keys, _ = mx.split(module.qkv(x), 3, axis=-1)
    q, k = (_in_heads(array, module.num_heads) for array in (queries, keys))
    return Heads(q, k, keys, module.scale, [x.shape[1]])


def _pixtral(module: Any, arguments: Mapping, inputs: Mapping, config: Any) -> Heads:
    """Return heads with rotary positions; pictures are concatenated."""
    queries = module.q_proj(arguments["queries"])
    keys = module.k_proj(arguments["keys"])
    both = [_in_heads(array, module.num_heads) for array in (queries, keys)]
    turn = _beside(module, "apply_rotary_pos_emb")
    q, k = turn(*both, *arguments["position_embeddings"], unsqueeze_dim=0)
    sizes = [height * width for height, width in _sizes(inputs, config)]
    return Heads(q, k, keys, module.scale, np.cumsum(sizes).tolist())


def _gemma4(module: Any, arguments: Mapping, inputs: Mapping, config: Any) -> Heads:
    """Return heads with norms and rotary positions; padding of pictures is left out."""
    x, places = arguments["x"], arguments["positions"]
    turn = _beside(module, "apply_multidimensional_rope")
    # Pictures are padded to one length: padding has negative positions.
    patches = mx.array(np.flatnonzero(np.all(np.array(places) >= 0, axis=-1)))

    def project(matrix: Any, norm: Any, heads: int) -> tuple[mx.array, mx.array]:
        plain = norm(matrix(x).reshape(*x.shape[:2], heads, -1))
        turned = turn(plain, places, module.rope_base_frequency)
        plain, turned = (a.flatten(0, 1)[patches][None] for a in (plain, turned))
        return plain.flatten(2), turned.swapaxes(1, 2)

    _, queries = project(module.q_proj, module.q_norm, module.num_heads)
    plain, keys = project(module.k_proj, module.k_norm, module.num_kv_heads)
    keys = mx.repeat(keys, module.num_heads // module.num_kv_heads, axis=1)
    ends = np.cumsum([height * width for height, width in _extents(places)]).tolist()
    return Heads(queries, keys, plain, 1.0, ends)


def _extents(places: mx.array) -> list[tuple[int, int]]:
    """Return the patches (h, w) of each picture.

    places: (..., L, 2), column and row of each patch; -1 for padding.
    """
    most = np.array(places).reshape(-1, *np.shape(places)[-2:]).max(axis=1) + 1
    return [(height, width) for width, height in most.tolist()]


def _beside(module: Any, name: str) -> Callable:
    """Return a function of mlx-vlm's file that defines the module's class."""
    # The hooks' subclasses keep `__module__`, so this is mlx-vlm's file, not ours.
    return getattr(sys.modules[type(module).__module__], name)


# From patches to tokens -------------------------------------------------------------


def _as_they_are(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
    """Return (N, C): each patch is a token."""
    return patches.reshape(-1, patches.shape[-1])


def _selected(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
    """Return LLaVA's tokens: without the class token, if the config selects so."""
    if model.vision_feature_select_strategy == "default":
        patches = patches[:, 1:]
    return _as_they_are(model, patches, inputs)


def _grouped(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
    """Return Qwen's tokens: means of adjacent patches, in the order of the picture."""
    tower, grid = model.vision_tower, inputs.get("image_grid_thw")
    unit = tower.spatial_merge_size**2
    tokens = mx.mean(patches.reshape(-1, unit, patches.shape[-1]), axis=1)
    if not hasattr(tower, "get_window_index"):
        return tokens
    # Qwen2.5-VL's tower orders tokens window by window.
    grid = inputs["video_grid_thw"] if grid is None else grid
    order, _ = tower.get_window_index(mx.array(np.array(grid)))
    return tokens[mx.argsort(order)]


def _cells(patches: mx.array, grid: tuple[int, int], side: int) -> mx.array:
    """Average squares (B, h * w, C) -> (B * n, C), without incomplete squares."""
    (height, width), (batch, _, channels) = grid, patches.shape
    rows, columns = height // side, width // side
    whole = patches.reshape(batch, height, width, channels)
    whole = whole[:, : rows * side, : columns * side]
    cells = whole.reshape(batch, rows, side, columns, side, channels)
    return mx.mean(cells, axis=(2, 4)).reshape(-1, channels)


def _in_squares(side: Callable[[Any], int], first: int = 0) -> Tokens:
    """Return `tokens` that averages square blocks of patches of square pictures.

    side: from a model, patches along a block. first: prefix tokens to skip.
    """

    def tokens(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
        patches = patches[:, first:]
        length = int(patches.shape[1] ** 0.5)
        return _cells(patches, (length, length), side(model))

    return tokens


def _sizes(inputs: Mapping, config: Any) -> list[tuple[int, int]]:
    """Return the patches (h, w) of each picture, for towers without a fixed size."""
    side, sizes = config.vision_config.patch_size, inputs.get("image_sizes")
    if sizes is None:
        pixels = inputs["pixel_values"]
        one = isinstance(pixels, mx.array) and pixels.ndim == 3
        sizes = [picture.shape[-2:] for picture in ([pixels] if one else pixels)]
    sizes = np.array(sizes).reshape(-1, 2).astype(int) // side
    return [(height, width) for height, width in sizes.tolist()]


def _merged(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
    """Return Mistral 3's tokens: means of squares of each picture."""
    side = model.config.spatial_merge_size
    return _joined(patches, _sizes(inputs, model.config), side)


def _joined(patches: mx.array, sizes: Sequence[tuple[int, int]], side: int) -> mx.array:
    """Average squares of pictures that are concatenated as (1, L, C)."""
    ends = np.cumsum([height * width for height, width in sizes])[:-1].tolist()
    parts = zip(mx.split(patches, ends, axis=1), sizes, strict=True)
    return mx.concatenate([_cells(part, grid, side) for part, grid in parts])


def _pooled(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
    """Return Gemma 4's tokens: means of squares of each picture or frame."""
    named = (inputs.get(f"{kind}_position_ids") for kind in ("image", "video"))
    places = next((array for array in named if array is not None), None)
    sizes = _sizes(inputs, model.config) if places is None else _extents(places)
    return _joined(patches, sizes, model.vision_tower.pooling_kernel_size)


def _laid_out(model: Any, patches: mx.array, inputs: Mapping) -> mx.array:
    """Return LLaVA-OneVision's tokens: tiles or frames, with 0 for newlines.

    mlx-vlm's own layout code runs, on patches in the place of features.
    """
    kind, channels = type(model), patches.shape[-1]
    blank = None if model.image_newline is None else mx.zeros(channels)
    # A stand-in for `self`: its tower returns the patches, its projector changes none.
    stands = SimpleNamespace(
        config=model.config,
        patches_per_side=model.patches_per_side,
        max_num_patches=model.max_num_patches,
        image_newline=blank,
        vision_tower=lambda *args, **named: (patches,),
        multi_modal_projector=lambda x: x,
    )
    strategy = model.config.vision_feature_select_strategy
    first = 1 if strategy == "default" else 0
    stands._select_features = lambda x: x[:, first:]
    for name in ("pack_image_features", "apply_pooling"):
        setattr(stands, name, functools.partial(getattr(kind, name), stands))
    if inputs.get("pixel_values") is not None:
        pixels, sizes = inputs["pixel_values"], inputs.get("image_sizes")
        return kind.get_image_features(stands, pixels, sizes)
    return kind.get_video_features(stands, inputs["pixel_values_videos"])


# Families ---------------------------------------------------------------------------


def _up_to(layers: Sequence, chosen: int | Sequence[int]) -> dict[int, Any]:
    """Return layers by number, up to the last one whose output the config chooses."""
    numbers = [chosen] if isinstance(chosen, int) else chosen
    last = max(n - 1 if n >= 0 else len(layers) + n for n in numbers)
    return {number: layer for number, layer in enumerate(layers) if number <= last}


def _layers(model: Any) -> list:
    """Return the layers of a `vision_tower` or, in some families, `vision_model`."""
    tower = getattr(model, "vision_tower", None) or model.vision_model
    return getattr(tower, "vision_model", tower).encoder.layers


def _of_layers(
    chosen: Callable[[Any], Any] = lambda model: -1, name: str = "self_attn"
) -> Callable[[Any], dict[int, Any]]:
    """Return `blocks` that reads the attention modules `name` of the tower's layers."""

    def blocks(model: Any) -> dict[int, Any]:
        layers = _up_to(_layers(model), chosen(model))
        return {number: getattr(layer, name) for number, layer in layers.items()}

    return blocks


def _whole(model: Any) -> dict[int, Any]:
    """Return Qwen's blocks without Qwen2.5-VL's windowed ones."""
    tower = model.vision_tower
    whole = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    return {n: block.attn for n, block in enumerate(tower.blocks) if n in whole}


def _mixers(model: Any) -> dict[int, Any]:
    """Return FastViTHD's attention modules, which are in its last stages."""
    stages = [s for s in model.vision_tower.vision_model.network if isinstance(s, list)]
    blocks = [block for stage in stages for block in stage]
    mixers = enumerate(getattr(block, "token_mixer", None) for block in blocks)
    return {n: mixer for n, mixer in mixers if hasattr(mixer, "qkv")}


def _pixtrals(model: Any) -> dict[int, Any]:
    """Return Pixtral's attention modules."""
    layers = model.vision_tower.vision_model.transformer.layers
    layers = _up_to(layers, model.vision_feature_layer)
    return {number: layer.attention for number, layer in layers.items()}


def _has_class(model: Any) -> bool:
    """Return whether LLaVA's tower is CLIP, with a class token, and not SigLIP."""
    return model.vision_tower.vision_model.embeddings.class_embedding is not None


def _depth(model: Any) -> int:
    return len(_layers(model))


def _chosen(model: Any) -> int | Sequence[int]:
    return model.config.vision_feature_layer


def _shuffle(model: Any) -> int:
    """Return the patches along InternVL's pixel shuffle."""
    return round(1 / model.downsample_ratio)


_ROTARY = ("x", "cu_seqlens", "rotary_pos_emb")
_PLAIN = Tower(_of_layers(), _depth, _projected("x"), ("x",), _as_they_are)
_LLAVA = {"depth": _depth, "heads": _projected("queries"), "takes": ("queries",)}
_PIXTRAL = {
    "blocks": _pixtrals,
    "depth": lambda model: len(model.vision_tower.vision_model.transformer.layers),
    "heads": _pixtral,
    "takes": ("queries", "keys", "position_embeddings"),
}
QWEN = Tower(
    _whole, lambda model: len(model.vision_tower.blocks), _qwen, _ROTARY, _grouped
)
LLAVA = Tower(_of_layers(_chosen), tokens=_selected, asks=_has_class, **_LLAVA)
ONEVISION = Tower(_of_layers(_chosen), tokens=_laid_out, **_LLAVA)
IDEFICS = Tower(
    *(_PLAIN.blocks, _depth, _PLAIN.heads, ("x",)),
    _in_squares(lambda model: model.config.scale_factor),
)
INTERN = Tower(
    *(_of_layers(name="attn"), _depth, _intern, ("x",), _in_squares(_shuffle, 1)),
    lambda model: True,
)
GEMMA3 = Tower(
    *(_PLAIN.blocks, _depth, _PLAIN.heads, ("x",)),
    _in_squares(lambda model: model.multi_modal_projector.kernel_size),
)
# mlx-vlm's PaliGemma reads only the first picture.
PALIGEMMA = Tower(
    *(_PLAIN.blocks, _depth, _PLAIN.heads, ("x",)),
    lambda model, patches, inputs: patches[0],
)
GEMMA4 = Tower(
    *(_PLAIN.blocks, _depth, _gemma4, ("x", "positions"), _pooled), apart=True
)
PIXTRAL = Tower(tokens=_as_they_are, **_PIXTRAL)
MISTRAL3 = Tower(tokens=_merged, **_PIXTRAL)
FASTVLM = Tower(
    _mixers, lambda model: 1 + max(_mixers(model)), _fastvit, ("x",), _as_they_are
)
