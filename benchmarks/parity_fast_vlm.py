"""Compare our FastVLM with transformers' `fast_vlm`: features, logits and greedy ids.

    pip install torch transformers -e .
    pip install --no-deps timm torchvision
    python benchmarks/parity_fast_vlm.py [--full] [--size 256]
    python benchmarks/parity_fast_vlm.py --manifest FILE

Our code loads a checkpoint with random weights as transformers saves it, and after
`convert`. One square image is used, with our pixels. `--full`: the tower of full size.
Prints the largest differences relative to the largest value; exits 1 when a difference
exceeds 1e-3 or ids differ. `--manifest` writes names and shapes of a full-size 0.5B
checkpoint and its config, for `tests/data/manifests`.
"""

import argparse
import gzip
import json
import math
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from parity_openvla import DATA, Report
from torch import nn
from torchvision_stub import repair_torchvision

from mlx_tokprune import load
from mlx_tokprune.convert import convert
from mlx_tokprune.pipeline import Scene, assemble, look
from mlx_tokprune.processing.image import load_image

import mlx.core as mx  # isort: skip

TINY = DATA / "fastvlm-tiny"
PROMPT, TOKENS, PICTURE = "Describe the image.", 12, 300
SMALL = {
    "layers": [1, 1, 2, 2, 1],
    "embed_dims": [16, 32, 32, 64, 128],
    "mlp_ratios": [2, 2, 2, 2, 2],
}
LANGUAGE = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320},
    **{"max_position_embeddings": 4096, "eos_token_id": 258, "bos_token_id": 256},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
# Qwen2-0.5B with rows for the picture's token, as transformers published it.
QWEN2 = {
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 152000},
    **{"max_position_embeddings": 131072, "eos_token_id": 151643},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def make_model(text: dict, sizes: dict, features: int):
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    vision = {
        **{"model_type": "timm_wrapper", "architecture": "fastvit_mci3"},
        **{"do_pooling": True, "global_pool": "avg", "hidden_size": features},
        "model_args": {"inference_mode": True, **sizes},
    }
    config = FastVlmConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **text},
        image_token_index=PICTURE,
    )
    return FastVlmForConditionalGeneration(config).eval()


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Fill a module with random weights and statistics that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            value = 1 + 0.5 * value.clamp(-1, 1)
        elif name.endswith(("bias", "running_mean")):
            value = 0.1 * value
        elif "gamma" in name or tensor.ndim == 1:
            value = 1 + 0.2 * value
        elif "embed" not in name:
            value *= 1.4 / math.sqrt(tensor[0].numel())
        tensor.copy_(value)


def save(model, folder: Path, size: int) -> None:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = size  # read only by our model
    (folder / "config.json").write_text(json.dumps(config))
    for path in TINY.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


@torch.no_grad()
def answer(model, ids: list[int], pixels: torch.Tensor):
    """Return features, projected tokens, logits of the prompt, and greedy ids."""
    found = model.model.get_image_features(pixels)
    features = found.last_hidden_state.flatten(2).transpose(1, 2)
    made, logits = [], None
    for _ in range(TOKENS):
        given = torch.tensor([[*ids, *made]])
        out = model(input_ids=given, pixel_values=pixels, use_cache=False).logits[0]
        logits = out if logits is None else logits
        made.append(int(out[-1].argmax()))
    return features, found.pooler_output, logits, made


def compare(report: Report, name: str, folder: Path, theirs, picture) -> None:
    model, processor = load(folder, mx.float32)
    features, projected, logits, ids = theirs
    pixels = mx.array(processor.pixels([picture]))
    scene = Scene(pixels, processor.prompt(PROMPT, 1))
    visual = look(model, scene, ())
    report.close(f"{name}: features", model.encode(pixels).tokens, features)
    ours = model.project(model.encode(pixels).tokens)
    report.close(f"{name}: projected", ours, projected)
    sequence = assemble(model, scene, visual, (), "original")
    embeddings = sequence.embeddings
    empty = mx.zeros((1, 0), mx.int32)
    ours = model(empty, input_embeddings=embeddings)[0]
    report.close(f"{name}: logits", ours, logits)
    made = []
    for _ in range(TOKENS):
        last = model(empty, input_embeddings=embeddings)[0, -1]
        made.append(int(mx.argmax(last)))
        token = model.decoder.embed(mx.array([[made[-1]]]))
        embeddings = mx.concatenate([embeddings, token], axis=1)
    report.equal(f"{name}: greedy ids", made, ids)


def write_manifest(file: Path) -> None:
    with torch.device("meta"):
        model = make_model(QWEN2, {}, 3072)
    tensors = {name: list(t.shape) for name, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    text = json.dumps({"config": config, "tensors": tensors}, sort_keys=True)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the tower of full size")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    parser.add_argument(
        "--manifest", type=Path, help="write this file, compare nothing"
    )
    args = parser.parse_args()
    repair_torchvision()
    if args.manifest:
        write_manifest(args.manifest)
        return
    model = make_model(LANGUAGE, *(({}, 3072) if args.full else (SMALL, 256)))
    randomize(model)
    picture = load_image(TINY / "image_0.png").resize((args.size, args.size))
    report = Report()
    with tempfile.TemporaryDirectory() as root:
        source, target = Path(root) / "source", Path(root) / "mlx"
        save(model, source, args.size)
        convert(str(source), str(target))
        processor = load(source)[1]
        pixels = torch.from_numpy(np.array(processor.pixels([picture])))
        before, after = processor.prompt(PROMPT, 1).segments
        ids = [*before, *[PICTURE] * (args.size // 64) ** 2, *after]
        theirs = answer(model, ids, pixels.permute(0, 3, 1, 2))
        for name, folder in (("original", source), ("converted", target)):
            compare(report, name, folder, theirs, picture)
    packages = ("torch", "timm", "transformers", "mlx")
    print(", ".join(f"{name} {metadata.version(name)}" for name in packages))
    sys.exit(report.failed > 0)


if __name__ == "__main__":
    main()
