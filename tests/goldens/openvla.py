"""Golden folders of OpenVLA: a tiny random checkpoint and a reference's values for it.

    python3 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0 pillow==13.0.0
    /tmp/reference/bin/pip install --no-deps timm==1.0.31 torchvision==0.28.0
    /tmp/reference/bin/python tests/goldens/openvla.py --seed 7 --output FOLDER
    /tmp/reference/bin/python tests/goldens/openvla.py --check tests/data/openvla-tiny

The references are timm's `VisionTransformer` with the settings of DINOv2 and of SigLIP
at tiny sizes, torch's layers for the projector, and transformers' Llama, in float32;
mlx_tokprune is not used. Run with these versions, which brought tokenizers 0.23.3 and
numpy 2.4.6.

Config and tokenizer are those of `tests/data/openvla-tiny`. The weights stored there
came from another generator: no seed here gives them, `--check` recomputes the rest.
"""

from pathlib import Path

import numpy as np
import torch
from command import as_arrays, read_config, read_json, run, write_expected, write_json
from PIL import Image
from recipe import DATA, copy_settings, draw_picture, write_weights
from reference import answer, embed, import_timm, load_into, selections
from tokenizers import Tokenizer
from torch import nn

INSTRUCTION = "pick up the cup"
QUESTION = "In: What action should the robot take to {}?\nOut:"
SIZE = (200, 150)  # of the picture
NUMBERS = 7  # of an action


class OpenVLA:
    """Towers, projector and language model of the reference, with initial weights."""

    def __init__(self, config: dict):
        size, vision = config["image_sizes"][0], config["vision_config"]
        self.dinov2 = make_tower(vision["featurizer"], size, no_embed_class=True)
        self.siglip = make_tower(vision["fused_featurizer"], size, global_pool="map")
        widths = sum(v["embed_dim"] for v in vision.values())
        hidden = config["text_config"]["hidden_size"]
        self.projector = make_projector(widths, hidden)
        self.language = make_language(config["text_config"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the models' own tensors under OpenVLA's names."""
        parts = {
            "vision_backbone.featurizer": self.dinov2,
            "vision_backbone.fused_featurizer": self.siglip,
            "projector": self.projector,
            "language_model": self.language,
        }
        return {
            f"{part}.{name.replace('.gamma', '.scale_factor')}": tensor
            for part, model in parts.items()
            for name, tensor in model.state_dict().items()
        }


def make_tower(tower: dict, size: int, **settings) -> nn.Module:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    names += ("class_token", "reg_tokens")
    sizes = {name: tower[name] for name in names}
    scale = 1.0 if tower["layer_scale"] else None
    options = {"img_size": size, "num_classes": 0, "init_values": scale}
    return VisionTransformer(**sizes, **options, **settings).eval()


def make_projector(inputs: int, hidden: int) -> nn.Module:
    projector = nn.Sequential()
    projector.add_module("fc1", nn.Linear(inputs, 4 * inputs))
    projector.add_module("gelu1", nn.GELU())
    projector.add_module("fc2", nn.Linear(4 * inputs, hidden))
    projector.add_module("gelu2", nn.GELU())
    projector.add_module("fc3", nn.Linear(hidden, hidden))
    return projector


def make_language(text: dict) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**text)).eval()


def read_pixels(file: Path, size: int, preprocessor: dict) -> torch.Tensor:
    """Return (1, 6, S, S): stretched to a square, normalised for each tower."""
    picture = Image.open(file).convert("RGB")
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)
    both = []
    for names in zip(preprocessor["means"], preprocessor["stds"], strict=True):
        mean, std = (torch.tensor(values)[:, None, None] for values in names)
        both.append((pixels - mean) / std)
    return torch.cat(both)[None]


def patches(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return (1, N, C) patch tokens of the second to last block, without a norm."""
    last = len(tower.blocks) - 2
    return tower.get_intermediate_layers(pixels, n={last}, norm=False)[0]


def scores_of(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return (N,) scores of each method for (N, C) tokens."""
    mean = tokens.mean(0, keepdim=True)
    similarity = nn.functional.cosine_similarity(tokens, mean)
    return {"norm": tokens.norm(dim=-1), "mean_similarity": similarity}


def to_units(ids, config: dict) -> np.ndarray:
    """Convert greedy ids to bins in [-1, 1], and to robot units where masked."""
    vocabulary = config["text_config"]["vocab_size"] - config["pad_to_multiple_of"]
    edges = np.linspace(-1, 1, config["n_action_bins"])
    centers = (edges[:-1] + edges[1:]) / 2
    chosen = np.clip(vocabulary - np.asarray(ids) - 1, 0, len(centers) - 1)
    entry = next(iter(config["norm_stats"].values()))["action"]
    low, high = np.array(entry["q01"]), np.array(entry["q99"])
    scaled = low + (centers[chosen] + 1) / 2 * (high - low)
    return np.where(entry["mask"], scaled, centers[chosen])


def prompt_ids(folder: Path, config: dict) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(QUESTION.format(INSTRUCTION)).ids
    return [config["text_config"]["bos_token_id"], *ids, config["empty_token_id"]]


def describe(model: OpenVLA, config: dict, pixels, ids: list[int]) -> dict:
    """Return all values of the image and its prompt by name."""
    towers = (model.dinov2, pixels[:, :3]), (model.siglip, pixels[:, 3:])
    features = [patches(tower, part) for tower, part in towers]
    tokens = torch.cat(features, dim=-1)
    projected = model.projector(tokens)
    values = {
        "pixel_values": pixels[:, :, ::8, ::8],
        "input_ids": torch.tensor(ids),
        "dinov2_features": features[0],
        "siglip_features": features[1],
        "projected": projected,
    }
    for case, kept in selections(scores_of(tokens[0])).items():
        found = act_on(model, config, projected[:, kept], ids)
        found |= {"indices": kept} if case else {}
        values |= {f"{case}_{k}" if case else k: v for k, v in found.items()}
    return values


def act_on(model: OpenVLA, config: dict, visual: torch.Tensor, ids: list[int]) -> dict:
    start, text = (embed(model.language, part) for part in (ids[:1], ids[1:]))
    sequence = torch.cat([start, visual, text], dim=1)
    logits, chosen = answer(model.language, sequence, NUMBERS)
    action = to_units(chosen, config)
    return {"logits": logits, "greedy_ids": chosen, "action": action}


@torch.no_grad()
def compute(folder: Path) -> dict[str, np.ndarray]:
    config = read_config(folder, "openvla")
    preprocessor = read_json(folder / "preprocessor_config.json")
    model = OpenVLA(config)
    load_into(model.tensors(), folder, set())
    size = config["image_sizes"][0]
    pixels = read_pixels(folder / "image_0.png", size, preprocessor)
    found = describe(model, config, pixels, prompt_ids(folder, config))
    return as_arrays(found)


def make(seed: int, folder: Path) -> None:
    copy_settings(DATA / "openvla-tiny", folder)
    config = read_config(folder, "openvla")
    tensors = OpenVLA(config).tensors()
    write_weights(seed, {k: tuple(t.shape) for k, t in tensors.items()}, folder)
    draw_picture(seed, 0, *SIZE).save(folder / "image_0.png")
    expected = compute(folder)
    write_expected(expected, folder)
    asked = {"image": "image_0.png", "instruction": INSTRUCTION}
    asked["unnorm_key"] = next(iter(config["norm_stats"]))
    results = {name: expected[name].tolist() for name in ("greedy_ids", "action")}
    write_json(asked | results, folder / "expected_0.json")


if __name__ == "__main__":
    run(__doc__.splitlines()[0], make, compute)
