"""Write a checkpoint of full size with random weights, as its authors store it.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B --dtype float16
    python benchmarks/random_checkpoint.py OpenVLA-7B /tmp/OpenVLA-7B --dtype bfloat16

Sizes 0.5B, 1.5B and 7B are FastVLM's. The names and shapes come from
`tests/data/manifests`; the tokenizer is that of the tiny test checkpoint. Weights are
scaled so that activations stay finite, and large tensors repeat a random block.
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

from mlx_tokprune.convert.checkpoint import write_config, write_shards

TESTS = Path(__file__).parents[1] / "tests" / "data"
BLOCK = 1_000_003  # a prime, so that no two rows of a matrix are equal
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
    """Random normals, which repeat after `BLOCK` of them."""
    size = math.prod(shape)
    block = (scale * mx.random.normal([min(size, BLOCK)])).astype(dtype)
    return mx.tile(block, math.ceil(size / BLOCK))[:size].reshape(shape)


def read_manifest(size: str, layers: int | None) -> tuple[dict, Path]:
    """The manifest, cut to `layers` of the language model, and the tokenizer's folder.

    `layers` is for OpenVLA; `None` keeps them all.
    """
    openvla = size.startswith("OpenVLA")
    name = size if openvla else f"FastVLM-{size}"
    path = TESTS / "manifests" / f"{name}.json.gz"
    manifest = json.loads(gzip.decompress(path.read_bytes()))
    if openvla:
        manifest["config"]["empty_token_id"] = 5  # of the tiny tokenizer
    if layers:
        text = LLAMA_2_7B | {"num_hidden_layers": layers}
        manifest["config"]["text_config"] |= text
        manifest["tensors"] = {
            n: s for n, s in manifest["tensors"].items() if layer_number(n) < layers
        }
    return manifest, TESTS / ("openvla-tiny" if openvla else "fastvlm-tiny")


def layer_number(name: str) -> int:
    """The language model layer of an OpenVLA tensor; -1 for any other tensor."""
    match = re.match(r"language_model\.model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=["0.5B", "1.5B", "7B", "OpenVLA-7B"])
    parser.add_argument("folder", type=Path)
    types = ["float16", "bfloat16", "float32"]
    parser.add_argument("--dtype", default="float16", choices=types)
    parser.add_argument(
        "--layers",
        type=int,
        choices=range(1, 33),
        metavar="N",
        help="keep the first N of OpenVLA's 32 language model layers",
    )
    args = parser.parse_args()
    if args.layers and args.size != "OpenVLA-7B":
        parser.error("--layers is for OpenVLA-7B")
    manifest, tiny = read_manifest(args.size, args.layers)
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
    for source in tiny.glob("tokenizer*"):
        shutil.copy(source, args.folder)
    print(f"wrote {len(tensors)} tensors to {args.folder}")


if __name__ == "__main__":
    main()
