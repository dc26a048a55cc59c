"""Compare OpenVLA, OpenVLA-OFT and Prismatic with timm, transformers and torch.

    pip install torch transformers -e .
    pip install --no-deps timm torchvision
    python benchmarks/parity_openvla.py [--layers 4] [--hidden 512] [--heads 8]

Towers have full size and the Llama is smaller; weights are random. The torch side
computes its own pixels, features, sequence and actions; only the token ids of the
prompt, OFT's pixels and the indices that `trimvla` keeps are ours. Prints the largest
difference of each stage relative to the largest value; exits 1 when a difference
exceeds 1e-3 or ids differ. Needs 8 GB of memory.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch_openvla import (
    NUMBERS,
    PATCHES,
    STATE,
    MLPResNet,
    Projector,
    Tower,
    act,
    bins,
    hidden_states,
    largest,
    make_language,
    randomize,
    regress,
    to_units,
)
from torchvision_stub import repair_torchvision

import mlx_tokprune
from mlx_tokprune import InputError, Pruner, predict_action
from mlx_tokprune.act.inputs import observe
from mlx_tokprune.convert import convert
from mlx_tokprune.pipeline import encode, prune_at_tower, run
from mlx_tokprune.processing.image import load_image, preprocess_naive
from mlx_tokprune.pruners import as_plan

import mlx.core as mx  # isort: skip

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
DINO = "vit_large_patch14_reg4_dinov2"
SIGLIP = "vit_so400m_patch14_siglip_224"
CLIP = "vit_large_patch14_clip_224"
INSTRUCTION = "put the carrot on the plate"
LIMIT = 1e-3


class Report:
    """Printer of comparisons that counts the failed ones."""

    def __init__(self):
        self.failed = 0

    def line(self, name: str, right: bool, result: str) -> None:
        self.failed += not right
        print(f"{name:<42} {result}{'' if right else '   FAILED'}", flush=True)

    def close(self, name: str, ours, theirs) -> None:
        """Print max |ours - theirs| / max |theirs|, which fails above `LIMIT`."""
        ours, theirs = (np.asarray(x).astype(np.float64) for x in (ours, theirs))
        same = ours.shape == theirs.shape
        error = np.abs(ours - theirs).max() / np.abs(theirs).max() if same else np.nan
        self.line(name, error <= LIMIT, f"{error:.1e}")

    def equal(self, name: str, ours, theirs) -> None:
        ours, theirs = (
            x if isinstance(x, list) else list(map(int, x)) for x in (ours, theirs)
        )
        shown = f" {ours}" if len(str(ours)) < 60 else ""
        self.line(
            name, ours == theirs, f"{'equal' if ours == theirs else 'differ'}{shown}"
        )


# Checkpoints ------------------------------------------------------------------------


def write_checkpoint(
    report: Report, folder: Path, towers: list[Tower], projector, language
) -> dict:
    """Write a checkpoint in OpenVLA's layout and return its config."""
    with gzip.open(DATA / "manifests" / "OpenVLA-7B.json.gz") as file:
        manifest = json.load(file)
    text = language.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    config = manifest["config"] | {
        "use_fused_vision_backbone": len(towers) > 1,
        "image_sizes": [224] * len(towers),
        "timm_model_ids": [tower.id for tower in towers],
        "timm_override_act_layers": [tower.act for tower in towers],
        "empty_token_id": 5,
        "text_config": manifest["config"]["text_config"]
        | {name: getattr(text, name) for name in names},
    }
    means, stds = [t.mean for t in towers], [t.std for t in towers]
    tensors = {f"language_model.{k}": v for k, v in language.state_dict().items()}
    tensors |= {f"projector.{k}": v for k, v in projector.state_dict().items()}
    parts = ("featurizer", "fused_featurizer")
    for part, tower in zip(parts, towers, strict=False):
        for name, tensor in tower.model.state_dict().items():
            name = name.replace(".gamma", ".scale_factor")
            tensors[f"vision_backbone.{part}.{name}"] = tensor
    if len(towers) > 1:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        ours, theirs = _vision(shapes), _vision(manifest["tensors"])
        report.equal("names and shapes of the towers", ours, theirs)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "means": means,
        "stds": stds,
        "image_resize_strategy": "resize-naive",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "openvla-tiny" / name, folder)
    return config


def _vision(tensors: dict) -> list:
    return sorted(item for item in tensors.items() if item[0].startswith("vision"))


def write_oft(folder: Path, source: Path, head, state_projector) -> dict:
    """Write the policy of `source` as OpenVLA-OFT and return its statistics."""
    folder.mkdir()
    for path in source.iterdir():
        os.link(path, folder / path.name)
    for part, module in {
        "action_head": {f"model.{k}": v for k, v in head.state_dict().items()},
        "proprio_projector": state_projector.state_dict(),
    }.items():
        state = {f"module.{name}": tensor for name, tensor in module.items()}
        torch.save(state, folder / f"{part}--1_checkpoint.pt")
    random = np.random.default_rng(2)
    statistics = {}
    for part, size in (("action", NUMBERS), ("proprio", STATE)):
        low = random.uniform(-1, 0, size)
        high = low + random.uniform(0.5, 1, size)
        mask = [True] * (size - 1) + [part == "proprio"]
        entry = {"q01": low.tolist(), "q99": high.tolist(), "mask": mask}
        statistics[part] = entry
    everything = {"libero_spatial_no_noops": statistics}
    (folder / "dataset_statistics.json").write_text(json.dumps(everything))
    return statistics


# Comparisons ------------------------------------------------------------------------


def compare_policy(
    report: Report, label: str, folder: Path, towers: list[Tower], language, seed: int
):
    """Compare an OpenVLA or Prismatic checkpoint with torch, and empty `towers`.

    Return the projector and, for fused towers, the features of OFT's two images.
    """
    from torchvision.transforms import functional

    picture = make_picture(seed)
    resized = functional.resize(
        Image.fromarray(picture), [224, 224], functional.InterpolationMode.BICUBIC
    )
    pixels = functional.to_tensor(resized)[None]
    normalized = [tower.normalize(pixels) for tower in towers]
    features = [tower(pixels) for tower in towers]
    oft = None
    if len(towers) > 1:
        some = torch.from_numpy(oft_pixels()).permute(0, 3, 1, 2)
        oft = torch.cat([tower(some) for tower in towers], dim=-1)
    channels = sum(part.shape[-1] for part in features)
    hidden = language.config.hidden_size
    projector = randomize(Projector(channels, hidden, len(towers) > 1), 3)
    config = write_checkpoint(report, folder, towers, projector, language)
    names = [tower.id for tower in towers]
    towers.clear()  # half of the memory

    model, processor = mlx_tokprune.load(folder, dtype=mx.float32)
    told = processor.prompt(INSTRUCTION)
    (start,), prompt = told.segments
    scene = observe(processor, [[load_image(picture)]], told)
    seen = encode(model, scene, ())
    at = 0
    for i, name in enumerate(names):
        ours = (scene.pixels - mx.array(model.args.means[i])) / mx.array(
            model.args.stds[i]
        )
        report.close(f"{label} pixels {name}", ours, normalized[i].permute(0, 2, 3, 1))
        size = features[i].shape[-1]
        ours = seen.tokens[..., at : at + size]
        report.close(f"{label} features {name}", ours, features[i])
        at += size
    features = torch.cat(features, dim=-1)
    visual = projector(features)
    report.close(f"{label} projected", model.project(seen.tokens), visual)

    entry = config["norm_stats"]["bridge_orig"]["action"]
    everything = torch.arange(PATCHES)
    cases = {"all": (Pruner("none"), everything)}
    cases["norm 0.5"] = (
        Pruner("norm", keep_ratio=0.5),
        largest(features, PATCHES // 2),
    )
    theirs = {}
    for case, (pruner, kept) in cases.items():
        theirs[case] = act(language, start, prompt, visual, kept)
        logits, ids = theirs[case]
        patches = prune_at_tower(model, scene, as_plan(pruner), seen)
        report.equal(f"{label} {case} kept", patches.indices[0], kept)
        ours = logits_of(model, scene, patches)
        report.close(f"{label} {case} logits", ours, logits)
        asked = {"pruner": pruner, "positions": "original"}
        action = predict_action(model, processor, [picture], INSTRUCTION, **asked)
        report.equal(f"{label} {case} ids", action.token_ids, ids)
        report.close(
            f"{label} {case} action", action.values, to_units(bins(ids), entry)
        )
    del model, seen, patches, ours, action
    if len(names) > 1:
        compare_converted(report, label, folder, picture, theirs["all"], entry)
    return projector, oft


def logits_of(model, scene, visual) -> mx.array:
    """Return (B, V) logits of the first action token from these visual tokens."""
    read, _ = run(model, scene, positions="original", vision=lambda *_: visual)
    return model.decoder.logits(read.hidden)[:, -1]


def compare_converted(report, label, folder, picture, theirs, entry) -> None:
    """Compare the checkpoint after `convert`, without pruning, with torch."""
    mx.clear_cache()
    target = convert(str(folder), str(folder.with_name("converted")))
    model, processor = mlx_tokprune.load(target, dtype=mx.float32)
    action = predict_action(model, processor, [picture], INSTRUCTION)
    told = processor.prompt(INSTRUCTION)
    scene = observe(processor, [[load_image(picture)]], told)
    logits, ids = theirs
    ours = logits_of(model, scene, action.visual)
    report.close(f"{label} converted logits", ours, logits)
    report.equal(f"{label} converted ids", action.token_ids, ids)
    report.close(f"{label} converted action", action.values, to_units(bins(ids), entry))
    shutil.rmtree(target)


def compare_oft(report, folder, source, language, projector, features) -> None:
    """Compare OpenVLA-OFT with torch: two images, robot state, a chunk of actions."""
    hidden = language.config.hidden_size
    head = randomize(MLPResNet(hidden), 4)
    layers = {"fc1": nn.Linear(STATE, hidden), "gelu": nn.GELU()}
    layers["fc2"] = nn.Linear(hidden, hidden)
    state_projector = nn.Sequential()
    for name, layer in layers.items():
        state_projector.add_module(name, layer)
    randomize(state_projector, 5)
    statistics = write_oft(folder, source, head, state_projector)
    proprio = np.random.default_rng(6).uniform(-1, 1, STATE)
    low, high = (np.array(statistics["proprio"][n]) for n in ("q01", "q99"))
    state = np.clip(2 * (proprio - low) / (high - low + 1e-8) - 1, -1, 1)
    state = state_projector(torch.from_numpy(state[None]).float())

    model, processor = mlx_tokprune.load(folder, dtype=mx.float32)
    (start,), prompt = processor.prompt(INSTRUCTION).segments
    visual = projector(features).reshape(1, 2 * PATCHES, -1)
    for case, pruner in {
        "all": Pruner("none"),
        "norm 0.5": Pruner("norm", keep_ratio=0.5),
        "trimvla 0.25": Pruner("trimvla", keep_ratio=0.25),
    }.items():
        action = predict_action(
            *(model, processor, oft_pictures(), INSTRUCTION),
            **{"proprio": proprio, "pruner": pruner, "positions": "original"},
        )
        kept = torch.from_numpy(np.array(action.visual.indices[0])).long()
        if case == "norm 0.5":
            report.equal(f"OFT {case} kept", kept, largest(features, PATCHES // 2))
        chunk = regress(language, head, start, prompt, visual, kept, state)
        report.close(f"OFT {case} normalized ({len(kept)})", action.normalized, chunk)
        theirs = to_units(chunk.numpy(), statistics["action"], 1e-8)
        report.close(f"OFT {case} chunk", action.values, theirs)


def check_full_attention(report: Report, language) -> None:
    """Check that a mask of zeros gives full attention in transformers.

    With this mask the first state depends on the last token; with the mask of ones,
    which is causal, the first state does not.
    """
    x = torch.randn(2, 8, language.config.hidden_size) * 0.02
    x[1, :-1] = x[0, :-1]
    for full in (True, False):
        first = [
            hidden_states(language, x[i : i + 1], torch.arange(8), full)[0, 0]
            for i in range(2)
        ]
        moved = float((first[0] - first[1]).abs().max())
        name = f"transformers {'zeros' if full else 'causal'} mask, move of state 0"
        report.line(name, (moved > 0) == full, f"{moved:.1e}")


class Stranger:
    """Object that is not a tensor."""


def check_refusals(report: Report, folder: Path) -> None:
    """Check that `load` refuses pickles of other objects than tensors in one line."""
    shutil.copytree(DATA / "openvla-tiny", folder)
    for name, content in {
        "a class": {"a": Stranger()},
        "a bare object": {"x": [1, object()]},
        "a list": {"x": [1, 2]},
    }.items():
        torch.save(content, folder / "action_head--1_checkpoint.pt")
        try:
            mlx_tokprune.load(folder)
            report.line(f"pickle with {name}", False, "was read")
        except InputError as error:
            one = "\n" not in str(error)
            report.line(f"pickle with {name}", one, f"refused: {str(error)[-60:]}")


# The picture ------------------------------------------------------------------------


def make_picture(seed: int) -> np.ndarray:
    """Return a (240, 320, 3) image of coarse and fine noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (12, 16, 3)).repeat(20, 0).repeat(20, 1)
    return ((coarse + random.integers(0, 256, (240, 320, 3))) // 2).astype(np.uint8)


def oft_pictures() -> list[Image.Image]:
    return [load_image(make_picture(seed)) for seed in (11, 12)]


def oft_pixels() -> np.ndarray:
    """Return (2, 224, 224, 3) pixels, cropped by our code, which is not compared."""
    return preprocess_naive(oft_pictures(), 224, 0.9, Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of the Llama")
    parser.add_argument("--hidden", type=int, default=512, help="its width")
    parser.add_argument("--heads", type=int, default=8, help="its attention heads")
    args = parser.parse_args()
    begin = time.perf_counter()
    repair_torchvision()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    report, language = Report(), make_language(args)
    half = [0.5, 0.5, 0.5]
    imagenet = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    openai = [0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]
    check_full_attention(report, language)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        check_refusals(report, folder / "refused")
        towers = [Tower(CLIP, *openai, "quick_gelu")]
        compare_policy(report, "CLIP", folder / "clip", towers, language, 8)
        shutil.rmtree(folder / "clip")
        towers = [Tower(SIGLIP, half, half)]
        compare_policy(report, "SigLIP", folder / "siglip", towers, language, 9)
        shutil.rmtree(folder / "siglip")
        towers = [Tower(DINO, *imagenet), Tower(SIGLIP, half, half)]
        source = folder / "openvla"
        rest = compare_policy(report, "OpenVLA", source, towers, language, 10)
        compare_oft(report, folder / "openvla-7b-oft-libero", source, language, *rest)
    seconds = time.perf_counter() - begin
    packages = ("torch", "torchvision", "timm", "transformers", "mlx", "mlx-lm")
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    print(f"{report.failed} failed in {seconds:.0f} s; {', '.join(versions)}")
    sys.exit(report.failed > 0)


if __name__ == "__main__":
    main()
