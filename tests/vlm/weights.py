"""Random weights that make the answers of a tiny model vary."""

import copy

import mlx_tokprune  # noqa: F401  # before MLX

import mlx.core as mx  # isort: skip
from mlx.utils import tree_flatten  # isort: skip

SEED = 3  # of those with the liveliest answers
EVEN = 3**0.5  # times MLX's own first values keeps the variance
GAIN = 4.0  # instead, in language models: answers that hang on every token
SHARP = 2.0  # of norms before attention, so that it is not the same everywhere
FAINT = 0.1  # of biases, which are the same for all pictures
NOISE = 0.2  # on what starts as constant, such as the weights of norms


def build(config: dict, folder):
    """Build the model of `mlx_vlm.load` for `config`, with MLX's initial weights."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    config = copy.deepcopy(config)
    module, _ = get_model_and_args(config, folder)
    for part in ("text_config", "vision_config", "audio_config"):
        config.setdefault(part, {})
    mx.random.seed(SEED)
    settings = module.ModelConfig.from_dict(config)
    parts = ("text", "vision", "perceiver", "projector", "audio")
    return module.Model(update_module_configs(settings, module, config, parts))


def draw(
    model, silent: list[int], tied: bool, boosts: dict[str, float]
) -> dict[str, mx.array]:
    """Return tensors by name; logits of the `silent` ids are too small to win."""
    values = dict(tree_flatten(model.parameters()))
    drawn = {name: _scaled(name, values[name]) for name in sorted(values)}
    for part, factor in boosts.items():
        for name in drawn:
            drawn[name] *= factor if part in name else 1
    heads = [name for name in drawn if name.endswith("lm_head.weight")]
    if tied:
        drawn = {name: drawn[name] for name in drawn if name not in heads}
        heads = [name for name in drawn if name.endswith(".embed_tokens.weight")]
    rows = [0.02 if i in silent else 1.0 for i in range(drawn[heads[0]].shape[0])]
    drawn[heads[0]] *= mx.array(rows)[:, None]
    return drawn


def _scaled(name: str, value: mx.array) -> mx.array:
    if value.dtype == mx.uint32:  # packed
        return mx.random.randint(0, 2**31 - 1, value.shape).astype(mx.uint32)
    if value.size > 1 and mx.all(value == value.reshape(-1)[0]).item():
        value = value + NOISE * mx.random.normal(value.shape)
        value *= SHARP if name.endswith(("q_norm.weight", "k_norm.weight")) else 1
    if name.endswith(".bias"):
        return FAINT * value
    if value.ndim < 2 or "embed" in name:
        return value
    return (GAIN if "layers" in name and "vision" not in name else EVEN) * value
