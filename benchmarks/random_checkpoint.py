"""Write a FastVLM checkpoint of full size with random weights, as Apple stores it.

    python benchmarks/random_checkpoint.py 0.5B /tmp/FastVLM-0.5B --dtype float16

The names and shapes come from `tests/data/manifests`; the tokenizer is that of the
tiny test checkpoint. Weights are scaled so that activations stay finite.
"""

import argparse
import gzip
import json
import math
import shutil
from pathlib import Path

import mlx_tokprune  # noqa: F401  (loads the BLAS before MLX)

import mlx.core as mx  # isort: skip

from mlx_tokprune.convert.checkpoint import write_config, write_shards

TESTS = Path(__file__).parents[1] / "tests" / "data"


def random_tensor(name: str, shape: list[int], dtype: mx.Dtype) -> mx.array:
    if name.endswith("num_batches_tracked"):
        return mx.zeros(shape, mx.int64)
    if "layer_scale" in name:
        return mx.full(shape, 0.1, dtype)
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return mx.random.uniform(0.8, 1.2, shape).astype(dtype)
    if len(shape) == 1:
        return (0.02 * mx.random.normal(shape)).astype(dtype)
    fan_in = math.prod(shape[1:])
    return (mx.random.normal(shape) / math.sqrt(fan_in)).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=["0.5B", "1.5B", "7B"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    args = parser.parse_args()
    path = TESTS / "manifests" / f"FastVLM-{args.size}.json.gz"
    manifest = json.loads(gzip.decompress(path.read_bytes()))
    dtype = getattr(mx, args.dtype)
    mx.random.seed(0)
    args.folder.mkdir(parents=True)
    tensors = manifest["tensors"]
    stream = ((n, random_tensor(n, s, dtype)) for n, s in sorted(tensors.items()))
    write_shards(args.folder, stream, 0, shard_bytes=4 << 30)
    write_config(args.folder, manifest["config"] | {"torch_dtype": args.dtype})
    for source in (TESTS / "fastvlm-tiny").glob("tokenizer*"):
        shutil.copy(source, args.folder)
    print(f"wrote {len(tensors)} tensors to {args.folder}")


if __name__ == "__main__":
    main()
