"""Demo model and its training helpers: helper heads and oracle tokens.

Helper heads classify the content of a cell from its visual token, or from fine features
at stride 16. Oracle tokens stand for the projected tokens of a perfect tower: the
language model learns from them before the tower is trained, and the projector is
aligned to them. Only the FastVLM is shipped.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_tokprune.models.fastvlm import FastVLM, ModelArgs
from mlx_tokprune.scenes.pictures import CANVAS, CELL, COLORS, SHAPES, WORDS

from .labels import CHARACTERS

DEMO_CONFIG = {
    "architectures": ["LlavaQwen2ForCausalLM"],
    "model_type": "llava_qwen2",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "mm_vision_tower": "mobileclip_l_512",
    "mm_hidden_size": 512,
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "torch_dtype": "float16",
    "vision_config": {
        "layers": [1, 1, 3, 2, 2],
        "embed_dims": [16, 32, 64, 128, 256],
        "mlp_ratios": [2, 3, 4, 4, 4],
        "image_size": CANVAS,
        "patch_size": CELL,
        "head_dim": 32,
        "cls_ratio": 2.0,
        "token_mixers": ["repmixer"] * 3 + ["attention"] * 2,
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
    },
}
_FINE_STAGE = 2  # the third stage works at stride 16


class Heads(nn.Module):
    """Linear classifiers of the content of a cell."""

    CELL = {  # noqa: RUF012
        "shape": len(SHAPES) + 2,
        "color": len(COLORS) + 1,
        "x": CANVAS // 8,
        "y": CANVAS // 8,
        "x_inside": CELL // 8,
        "y_inside": CELL // 8,
        "word": len(WORDS),
        "tens": 10,
        "units": 10,
    }
    FINE = {  # noqa: RUF012
        "shape": len(SHAPES) + 1,
        "color": len(COLORS) + 1,
        "char": len(CHARACTERS) + 1,
    }

    def __init__(self, channels: int, fine_channels: int):
        super().__init__()
        self.cell = {k: nn.Linear(channels, n) for k, n in self.CELL.items()}
        self.fine = {k: nn.Linear(fine_channels, n) for k, n in self.FINE.items()}


class Oracle(nn.Module):
    """Embedding of cell labels (B, N) as oracle tokens (B, N, D)."""

    def __init__(self, size: int):
        super().__init__()
        entries = {"shape": len(SHAPES) + 2, "color": len(COLORS) + 1}
        entries |= {"word": len(WORDS) + 1, "tens": 11, "units": 11}
        self.tables = {k: nn.Embedding(n, size) for k, n in entries.items()}
        for table in self.tables.values():
            table.weight = 0.5 * mx.random.normal(table.weight.shape)
        self.place = nn.Linear(10, size)
        self.scale = mx.array(0.1)

    def __call__(self, labels: dict[str, mx.array]) -> mx.array:
        total = self.place(_place(labels))
        for name, table in self.tables.items():
            shift = 0 if name in ("shape", "color") else 1
            total = total + table(labels[name] + shift)
        return total * self.scale


def _place(labels: dict[str, mx.array]) -> mx.array:
    """Return position features (B, N, 10) of each cell's thing, else of its centre."""
    side = CANVAS // CELL
    cell = mx.arange(side * side)
    occupied = labels["shape"] > 0
    features = []
    for name, index in (("x", cell % side), ("y", cell // side)):
        middle = (index * CELL + CELL / 2) / CANVAS
        where = mx.where(occupied, (labels[name] * 8 + 4) / CANVAS, middle)
        features.append(2 * where - 1)
        for turns in (0.5, 1):
            angle = 2 * math.pi * turns * where
            features += [mx.sin(angle), mx.cos(angle)]
    return mx.stack(features, axis=-1)


class Student(nn.Module):
    """FastVLM in training form, with helper heads and oracle."""

    def __init__(self, config: dict = DEMO_CONFIG):
        super().__init__()
        args = ModelArgs.from_dict(config)
        self.vlm = FastVLM(args, inference=False)
        self.heads = Heads(args.vision.output_dim, args.vision.embed_dims[_FINE_STAGE])
        self.oracle = Oracle(config["hidden_size"])
        self._start_small()

    def _start_small(self) -> None:
        """Start skip convolutions near the identity and layer scales at a half."""
        for name, module in self.vlm.vision_tower.named_modules():
            if name.endswith(("token_mixer.reparam_conv",)) or _is_position_conv(name):
                size = module.weight.shape[1] // 2
                weight = 0.02 * mx.random.normal(module.weight.shape)
                module.weight = weight.at[:, size, size, 0].add(1.0)
            for scale in ("layer_scale", "layer_scale_1", "layer_scale_2"):
                if scale in module:
                    module[scale] = mx.full(module[scale].shape, 0.5)

    def see(self, pixels: mx.array) -> tuple[mx.array, mx.array]:
        """Return visual tokens (B, N, C) and fine features (B, H, W, C')."""
        tower = self.vlm.vision_tower.vision_model
        x, stages, fine = tower.patch_embed(pixels), 0, None
        for part in tower.network:
            if isinstance(part, list):
                for block in part:
                    x = block(x)
                fine = x if stages == _FINE_STAGE else fine
                stages += 1
            else:
                x = part(x)
        return tower.conv_exp(x).flatten(1, 2), fine


def _is_position_conv(name: str) -> bool:
    """Return whether `name` is `vision_model.network.N.reparam_conv`.

    This is the position convolution of a stage.
    """
    parts = name.split(".")
    return len(parts) == 4 and parts[1] == "network" and parts[3] == "reparam_conv"
