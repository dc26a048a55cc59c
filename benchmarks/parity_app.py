"""Compare a vision tower read from a Core ML package with Apple's own module.

    git clone https://github.com/apple/ml-fastvlm
    pip install torch coremltools "numpy<2.3" -e .
    pip install --no-deps timm torchvision
    python benchmarks/parity_app.py ml-fastvlm [--full] [--size 256] [--half]
    python benchmarks/parity_app.py ml-fastvlm --write tests/data/fastvithd-tiny

Apple's tower with random weights takes the steps of its `export_vision_encoder.py` for
the FastVLM app: it is traced, saved, and converted by coremltools. Prints the largest
difference of MLX's features from the package, relative to the largest value; exits 1
above 1e-3, or 1e-2 with `--half`, which exports float16. The package that Apple
publishes was not tested.
"""

import argparse
import importlib.util
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from parity_fast_vlm import randomize
from parity_openvla import Report
from torch import nn
from torchvision_stub import repair_torchvision

from mlx_tokprune.convert.coremltower import TOWER, read_tower
from mlx_tokprune.models.fastvithd import (
    FastViTHD,
    VisionConfig,
    drop_layer_scales,
    fold,
)

import mlx.core as mx  # isort: skip

SMALL = VisionConfig(
    layers=(1, 1, 2, 1, 1), embed_dims=(8, 8, 16, 32, 32), mlp_ratios=(2, 1, 1, 1, 1)
)


class Tower(nn.Module):
    """Apple's module under its names in the app's export."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.model = model

    @torch.no_grad()
    def forward(self, images):
        model = self.vision_tower.model
        features = model(images, return_image_embeddings=True)["image_embeddings"]
        return features.flatten(2).transpose(1, 2)


def make_tower(clone: Path, config: VisionConfig) -> Tower:
    file = clone / "llava/model/multimodal_encoder/mobileclip/mci.py"
    spec = importlib.util.spec_from_file_location("mci", file)
    mci = sys.modules["mci"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mci)
    position = partial(mci.RepCPE, spatial_shape=(7, 7))
    model = mci.FastViT(
        list(config.layers),
        token_mixers=config.token_mixers,
        embed_dims=list(config.embed_dims),
        mlp_ratios=list(config.mlp_ratios),
        downsamples=[True] * 5,
        pos_embs=[position if shape else None for shape in config.pos_embs_shapes],
        norm_layer=mci.LayerNormChannel,
        stem_scale_branch=False,
        inference_mode=True,
    )
    model.head = nn.Identity()  # unused here and in the export
    tower = Tower(model).eval().float()
    randomize(tower)
    return tower


def export(tower: Tower, pixels: torch.Tensor, package: Path, half: bool) -> None:
    import coremltools as ct

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/fastvithd.pt"
        torch.jit.trace(tower, pixels).save(file)
        precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
        model = ct.convert(
            model=file,
            outputs=[ct.TensorType(name="image_features", dtype=np.float32)],
            inputs=[ct.TensorType(name="images", shape=pixels.shape)],
            convert_to="mlprogram",
            compute_units=ct.ComputeUnit.CPU_AND_GPU,
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=precision,
            skip_model_load=True,
        )
    model.save(str(package))


def read_back(package: Path, config: VisionConfig) -> FastViTHD:
    found = read_tower(package, config.layers)
    named = {
        name.removeprefix(f"{TOWER}."): array.astype(mx.float32)
        for name, array in found.items()
    }
    tower = FastViTHD(config)
    drop_layer_scales(tower)
    tower.load_weights(list(fold(named).items()))
    return tower


def make_pixels(size: int) -> np.ndarray:
    """Return (1, S, S, 3) random pixels in [0, 1], equal on every machine."""
    return np.random.default_rng(0).random((1, size, size, 3), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help="of github.com/apple/ml-fastvlm")
    parser.add_argument("--full", action="store_true", help="the tower of full size")
    parser.add_argument("--half", action="store_true", help="a package of float16")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--write", type=Path, help="keep package and features here")
    args = parser.parse_args()
    repair_torchvision()
    config, report = VisionConfig() if args.full else SMALL, Report()
    tower, pixels = make_tower(args.clone, config), make_pixels(args.size)
    given = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    expected = tower(given).numpy()
    with tempfile.TemporaryDirectory() as folder:
        root = args.write or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        package = root / "fastvithd.mlpackage"
        export(tower, given, package, args.half)
        ours = np.array(read_back(package, config)(mx.array(pixels)).tokens)
        if args.write:
            stored = {"image_features": mx.array(expected)}
            mx.save_safetensors(str(root / "expected.safetensors"), stored)
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    limit = 1e-2 if args.half else 1e-3
    report.line("features", bool(error <= limit), f"{error:.1e}")
    packages = ("torch", "coremltools", "mlx")
    print(", ".join(f"{name} {metadata.version(name)}" for name in packages))
    sys.exit(report.failed > 0)


if __name__ == "__main__":
    main()
