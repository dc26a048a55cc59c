"""Write a full-size checkpoint with random weights in its authors' layout.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B --dtype float16
    python benchmarks/random_checkpoint.py OpenVLA-7B /tmp/OpenVLA-7B --dtype bfloat16
    python benchmarks/random_checkpoint.py pi0-FAST /tmp/pi0-FAST --dtype bfloat16

Sizes 0.5B, 1.5B and 7B are FastVLM's; pi0-FAST has lerobot's layout. The names and
shapes come from `tests/data/manifests`; tokenizers and a robot's statistics come from
the tiny test checkpoint. Weights are scaled so that activations stay finite, and large
tensors repeat a random block.
"""

import argparse
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import mlx_tokprune  # noqa: F401  (loads the BLAS before MLX)

import mlx.core as mx  # isort: skip

from mlx_tokprune.checkpoints.shards import write_config, write_shards

TESTS = Path(__file__).parents[1] / "tests" / "data"
BLOCK = 1_000_003  # a prime, so that no two rows of a matrix are equal
POLICIES = ("OpenVLA-7B", "pi0-FAST")
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}


def random_tensor(name: str, shape: list[int], dtype: mx.Dtype) -> mx.array:
    if name.endswith("num_batches_tracked"):
        return mx.zeros(shape, mx.int64)
    if "layer_scale" in name or name.endswith("scale_factor"):
        return mx.full(shape, 0.1, dtype)
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return mx.random.uniform(0.8, 1.2, shape).astype(dtype)
    if len(shape) == 1:
        return (0.02 * mx.random.normal(shape)).astype(dtype)
    return normal(shape, math.prod(shape[1:]) ** -0.5, dtype)


def normal(shape: list[int], scale: float, dtype: mx.Dtype) -> mx.array:
    """Return random normals that repeat after `BLOCK` values."""
    size = math.prod(shape)
    block = (scale * mx.random.normal([min(size, BLOCK)])).astype(dtype)
    return mx.tile(block, math.ceil(size / BLOCK))[:size].reshape(shape)


def read_manifest(
    size: str, layers: int | None, cameras: int | None = None
) -> tuple[dict, Path]:
    """Return the manifest and the folder of the tokenizer.

    layers: language model layers of a policy to keep. cameras: cameras of pi0-FAST to
    keep. `None` keeps all.
    """
    name = {"pi0-FAST": "pi0_fast", "OpenVLA-7B": size}.get(size, f"FastVLM-{size}")
    path = TESTS / "manifests" / f"{name}.json.gz"
    manifest = json.loads(gzip.decompress(path.read_bytes()))
    config = manifest["config"]
    if layers:
        manifest["tensors"] = {
            n: s for n, s in manifest["tensors"].items() if layer_number(n) < layers
        }
    if size == "pi0-FAST":
        tiny = json.loads((TESTS / "pi0fast-tiny" / "config.json").read_text())
        same = ("output_features", "normalization_mapping")
        config |= {key: tiny[key] for key in same}
        features = config["input_features"]
        seen = [name for name in features if ".images." in name][:cameras]
        config["input_features"] = {name: features[name] for name in seen}
        state = {"type": "STATE", "shape": [len(tiny["state"])]}
        config["input_features"]["observation.state"] = state
        # Random answers never end: two tokens time one call of each kind.
        config |= {"validate_action_token_prefix": False, "max_decoding_steps": 2}
        return manifest, TESTS / "pi0fast-tiny"
    if size == "OpenVLA-7B":
        config["empty_token_id"] = 5  # id in the tiny tokenizer
        if layers:
            config["text_config"] |= LLAMA_2_7B | {"num_hidden_layers": layers}
        return manifest, TESTS / "openvla-tiny"
    return manifest, TESTS / "fastvlm-tiny"


def layer_number(name: str) -> int:
    """Return the language model layer of a policy's tensor; -1 for other tensors."""
    match = re.search(r"language_model\.(?:model\.)?layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=["0.5B", "1.5B", "7B", *POLICIES])
    parser.add_argument("folder", type=Path)
    types = ["float16", "bfloat16", "float32"]
    parser.add_argument("--dtype", default="float16", choices=types)
    parser.add_argument(
        "--layers",
        type=int,
        choices=range(1, 33),
        metavar="N",
        help="keep the first N of a policy's language model layers",
    )
    help_ = "keep the first N of pi0-FAST's three cameras"
    parser.add_argument("--cameras", type=int, choices=(1, 2, 3), help=help_)
    args = parser.parse_args()
    if args.cameras and args.size != "pi0-FAST":
        parser.error("--cameras is for pi0-FAST")
    if args.layers and args.size not in POLICIES:
        parser.error(f"--layers is for {' and '.join(POLICIES)}")
    manifest, tiny = read_manifest(args.size, args.layers, args.cameras)
    dtype = getattr(mx, args.dtype)
    mx.random.seed(0)
    args.folder.mkdir(parents=True)
    tensors = manifest["tensors"]
    stream = ((n, random_tensor(n, s, dtype)) for n, s in sorted(tensors.items()))
    write_shards(args.folder, stream, 0, shard_bytes=2 << 30)
    write_config(args.folder, manifest["config"] | {"torch_dtype": args.dtype})
    if "preprocessor" in manifest:
        text = json.dumps(manifest["preprocessor"], indent=2)
        (args.folder / "preprocessor_config.json").write_text(text + "\n")
    for pattern in ("tokenizer*", "policy_preprocessor*"):
        for source in tiny.glob(pattern):
            shutil.copy(source, args.folder)
    if (tiny / "fast").is_dir():
        shutil.copytree(tiny / "fast", args.folder / "fast")
    print(f"wrote {len(tensors)} tensors to {args.folder}")


if __name__ == "__main__":
    main()
