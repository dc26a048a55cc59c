import gzip
import json
import os
import shutil
import struct
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"  # some GPUs would round float32 products

import mlx_tokprune

import mlx.core as mx  # isort: skip
import pytest  # isort: skip

DATA = Path(__file__).parent / "data"
TINY = DATA / "fastvlm-tiny"


@pytest.fixture(scope="session")
def tiny():
    """(model, processor) of the tiny golden checkpoint, in its original layout."""
    return mlx_tokprune.load(TINY)


@pytest.fixture(scope="session")
def expected():
    """What the reference implementation computed for the tiny checkpoint."""
    return mx.load(str(TINY / "expected.safetensors"))


@pytest.fixture
def checkpoint(tmp_path):
    """A writable copy of the tiny checkpoint."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder)
    for path in TINY.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def read_manifest(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


MANIFESTS = sorted((DATA / "manifests").glob("*.json.gz"))


def write_headers(folder: Path, tensors: dict, config: dict, shards: int = 2) -> None:
    """A checkpoint of the right shapes whose bytes are a hole on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        header, end = {}, 0
        for name in names[number::shards]:
            shape = tensors[name]
            size = 2
            for n in shape:
                size *= n
            header[name] = {
                "dtype": "F16",
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
            weight_map[name] = f"model-{number}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
