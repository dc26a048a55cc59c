"""Golden folders of FastVLM: a tiny random checkpoint and a reference's values for it.

    python3 -m venv /tmp/reference
    /tmp/reference/bin/pip install torch==2.13.0 transformers==5.24.0 pillow==13.0.0
    /tmp/reference/bin/pip install --no-deps timm==1.0.31 torchvision==0.28.0
    /tmp/reference/bin/python tests/goldens/fastvlm.py --seed 7 --output FOLDER
    /tmp/reference/bin/python tests/goldens/fastvlm.py --check tests/data/fastvlm-tiny

The references are timm's `fastvit_mci3` (the tower of FastVLM) at tiny sizes, torch's
layers for the projector, and transformers' Qwen2, in float32; mlx_tokprune is not used.
Run with these versions, which brought tokenizers 0.23.3 and numpy 2.4.6.

Config and tokenizer are those of `tests/data/fastvlm-tiny`. The weights stored there
came from another generator: no seed here gives them, `--check` recomputes the rest.
"""

from pathlib import Path

import numpy as np
import torch
from command import as_arrays, read_config, run, write_expected
from PIL import Image
from recipe import DATA, copy_settings, draw_picture, write_weights
from reference import answer, embed, import_timm, load_into, selections
from tokenizers import Tokenizer
from torch import nn

PROMPTS = ("Describe the image.", "What is on the left?")
SIZES = ((512, 512), (640, 400))  # of the pictures
TOKENS = 12
IMAGE = -200  # in place of the picture's token
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
)
AFTER = "\n{}<|im_end|>\n<|im_start|>assistant\n"
TOWER = "model.vision_tower.vision_tower.model"
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta")
TEXT += ("num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps")
TEXT += ("max_position_embeddings", "tie_word_embeddings")
# Apple's names of what timm calls otherwise.
RENAMED = {".mlp.": ".convffn.", ".gamma": "", "final_conv.": "conv_exp."}
RENAMED |= {"se.fc1": "se.reduce", "se.fc2": "se.expand", "stem.": "patch_embed."}
RENAMED |= {"proj.0.reparam_conv": "proj.0.lkb_reparam"}


class FastVLM:
    """Tower, projector and language model of the reference, with initial weights."""

    def __init__(self, config: dict):
        self.vision = config["vision_config"]
        self.tower = make_tower(self.vision)
        inputs, hidden = config["mm_hidden_size"], config["hidden_size"]
        layers = (nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.projector = nn.Sequential(*layers)
        self.language = make_language(config)
        self.stop = config["eos_token_id"]
        self.unused = {f"{TOWER}.head.proj": (inputs, inputs)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the models' own tensors under Apple's names."""
        places = network_places(self.vision)
        tower = self.tower.state_dict().items()
        named = {f"{TOWER}.{apple_name(k, places)}": v for k, v in tower}
        for name, tensor in self.projector.state_dict().items():
            named[f"model.mm_projector.{name}"] = tensor
        return named | dict(self.language.named_parameters())

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode (1, 3, S, S); return tokens (1, N, C) and attention received (N,)."""
        attention, weights = self.tower.stages[-1].blocks[-1].token_mixer, []
        # Only the unfused form has weights to look at, where dropout would be.
        attention.fused_attn = False
        hook = attention.attn_drop.register_forward_hook(
            lambda _, __, output: weights.append(output)
        )
        features = self.tower.forward_features(pixels)
        hook.remove()
        return features.flatten(2).transpose(1, 2), weights[0].mean((0, 1, 2))


def make_tower(vision: dict) -> nn.Module:
    sizes = {k: vision[k] for k in ("layers", "embed_dims", "mlp_ratios", "cls_ratio")}
    form = {"inference_mode": True, "num_classes": 0}
    return import_timm().create_model("fastvit_mci3", **sizes, **form).eval()


def make_language(config: dict) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = Qwen2Config(**{name: config[name] for name in TEXT})
    return Qwen2ForCausalLM(text).eval()


def network_places(vision: dict) -> dict[str, str]:
    """Map timm's stages to places in Apple's flat list of blocks."""
    places, at = {}, 0
    for stage, position in enumerate(vision["pos_embs_shapes"]):
        parts = ["downsample"] if stage else []
        parts += ["pos_emb"] if position else []
        for part in (*parts, "blocks"):
            places[f"stages.{stage}.{part}."] = f"network.{at}."
            at += 1
    return places


def apple_name(name: str, places: dict[str, str]) -> str:
    for ours, theirs in (places | RENAMED).items():
        name = name.replace(ours, theirs)
    return name


def read_pixels(file: Path, size: int) -> torch.Tensor:
    """Return (1, 3, S, S) in [0, 1]: padded to a black square, then resized."""
    picture = Image.open(file).convert("RGB")
    side = max(picture.size)
    square = Image.new("RGB", (side, side))
    square.paste(picture, tuple((side - n) // 2 for n in picture.size))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(square, np.float32) / 255
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def describe(model: FastVLM, pixels, before: list[int], after: list[int]) -> dict:
    """Return all values of one image and its prompt by name."""
    tokens, attention = model.see(pixels)
    projected = model.projector(tokens)
    values = {
        "pixel_values": pixels[:, :, ::8, ::8],
        "input_ids": torch.tensor([*before, IMAGE, *after]),
        "vision_features": tokens,
        "attention_received": attention,
        "projected": projected,
    }
    scores = {"norm": tokens[0].norm(dim=-1), "attention": attention}
    for case, kept in selections(scores).items():
        found = answer_with(model, before, projected[:, kept], after)
        found |= {"indices": kept} if case else {}
        values |= {f"{case}.{k}" if case else k: v for k, v in found.items()}
    return values


def answer_with(model: FastVLM, before, visual: torch.Tensor, after) -> dict:
    start, end = (embed(model.language, ids) for ids in (before, after))
    sequence = torch.cat([start, visual, end], dim=1)
    logits, ids = answer(model.language, sequence, TOKENS, model.stop)
    return {"last8_logits": logits, "greedy_ids": ids}


@torch.no_grad()
def compute(folder: Path) -> dict[str, np.ndarray]:
    model = FastVLM(read_config(folder, "llava_qwen2"))
    load_into(model.tensors(), folder, set(model.unused))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    values = {}
    for number, prompt in enumerate(PROMPTS):
        size = model.vision["image_size"]
        pixels = read_pixels(folder / f"image_{number}.png", size)
        texts = BEFORE, AFTER.format(prompt)
        ids = (tokenizer.encode(text).ids for text in texts)
        found = describe(model, pixels, *ids)
        values |= {f"{number}.{name}": value for name, value in found.items()}
    return as_arrays(values)


def make(seed: int, folder: Path) -> None:
    copy_settings(DATA / "fastvlm-tiny", folder)
    model = FastVLM(read_config(folder, "llava_qwen2"))
    shapes = {name: tuple(t.shape) for name, t in model.tensors().items()}
    write_weights(seed, shapes | model.unused, folder)
    for number, size in enumerate(SIZES):
        draw_picture(seed, number, *size).save(folder / f"image_{number}.png")
    write_expected(compute(folder), folder)


if __name__ == "__main__":
    run(__doc__.splitlines()[0], make, compute)
