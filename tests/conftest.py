import gzip
import json
import os
import platform
import shutil
import struct
import sys
from pathlib import Path

os.environ["MLX_ENABLE_TF32"] = "0"  # some GPUs would round float32 products

import mlx_tokprune

import mlx.core as mx  # isort: skip
import pytest  # isort: skip

from mlx_tokprune.errors import note
from mlx_tokprune.pruners import registry

# coremltools leaves temporary folders to be cleaned up by the garbage collector.
COREMLTOOLS_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def needs_coremltools() -> None:
    """Skip the whole module if coremltools has no wheel for this platform."""
    machine = sys.platform == "darwin" or platform.machine() == "x86_64"
    if sys.version_info >= (3, 14) or not machine:
        pytest.skip("coremltools has no wheel for this Python", allow_module_level=True)


DATA = Path(__file__).parent / "data"
TINY = DATA / "fastvlm-tiny"
TINY_POLICY = DATA / "openvla-tiny"
TINY_CHUNKS = DATA / "pi0fast-tiny"


@pytest.fixture(autouse=True)
def _same_methods():
    """Restore the registry of methods after each test; print notes anew in each."""
    note.cache_clear()
    before = [(known, dict(known)) for known in (registry._METHODS, registry._NAMES)]
    yield
    for known, names in before:
        known.clear()
        known.update(names)


@pytest.fixture(scope="module")
def not_compiled():
    """Disable `mx.compile`, which calls a C++ compiler for each mlx-vlm family."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Return a tiny Qwen2-VL loaded by mlx-vlm."""
    from vlm.families import FAMILIES
    from vlm.loaded import Loaded

    return Loaded(FAMILIES["qwen2_vl"], tmp_path_factory.mktemp("qwen") / "m")


@pytest.fixture(scope="session")
def tiny():
    """Return (model, processor) of the tiny golden checkpoint in Apple's layout."""
    return mlx_tokprune.load(TINY)


@pytest.fixture(scope="session")
def expected():
    """Return the values that the reference computed for the tiny checkpoint."""
    return mx.load(str(TINY / "expected.safetensors"))


@pytest.fixture(scope="session")
def demo():
    """Return (model, processor) of the embedded demo model."""
    return mlx_tokprune.load("demo")


@pytest.fixture(scope="session")
def demo_policy():
    """Return (model, processor) of the embedded demo policy."""
    return mlx_tokprune.load("demo-policy")


@pytest.fixture(scope="session")
def tiny_policy():
    """Return (model, processor) of the tiny golden policy in its original layout."""
    return mlx_tokprune.load(TINY_POLICY)


@pytest.fixture(scope="session")
def tiny_chunks():
    """Return (model, processor) of the tiny pi0-FAST policy in lerobot's layout."""
    return mlx_tokprune.load(TINY_CHUNKS)


@pytest.fixture
def policy_checkpoint(tmp_path):
    """Return the folder of a writable copy of the tiny policy."""
    return copy_policy(tmp_path / "policy")


def copy_policy(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copyfile(TINY_POLICY / name, folder / name)
    for path in TINY_POLICY.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


OFT = {"chunk": 3, "pictures": 2, "rule": "bounds_q99", "crop": 0.9}


def side_tensors(proprio: int = 5, hidden: int = 96, actions: int = 7) -> dict:
    """Return random tensors under the names of OpenVLA-OFT's side files."""
    shapes = {
        "layer_norm1": hidden * actions,
        "layer_norm2": hidden,
        "fc1": (hidden, hidden * actions),
        "fc2": (actions, hidden),
        "mlp_resnet_blocks.0.ffn.0": hidden,
        "mlp_resnet_blocks.0.ffn.1": (hidden, hidden),
        "mlp_resnet_blocks.1.ffn.0": hidden,
        "mlp_resnet_blocks.1.ffn.1": (hidden, hidden),
    }
    shapes = {f"action_head.model.{name}": shape for name, shape in shapes.items()}
    shapes["proprio_projector.fc1"] = (hidden, proprio)
    shapes["proprio_projector.fc2"] = (hidden, hidden)
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        key, matrix = mx.random.key(number), isinstance(shape, tuple)
        rows = shape[0] if matrix else shape
        weight = mx.random.normal(shape if matrix else (shape,), key=key)
        scale = 1 / shape[1] ** 0.5 if matrix else 0.1
        tensors[f"{name}.weight"] = weight * scale + (0 if matrix else 1)
        tensors[f"{name}.bias"] = 0.1 * mx.random.normal((rows,), key=key)
    return tensors


@pytest.fixture(scope="session")
def oft_folder(tmp_path_factory):
    """Return the tiny policy as OpenVLA-OFT, with random heads in one safetensors."""
    folder = copy_policy(tmp_path_factory.mktemp("oft") / "policy")
    weights = mx.load(str(folder / "model.safetensors")) | side_tensors()
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text()) | {"oft": OFT}
    (folder / "config.json").write_text(json.dumps(config))
    action = config["norm_stats"]["toy_robot"]["action"]
    proprio = {"q01": [-1.0] * 5, "q99": [2.0] * 5, "mask": [True] * 5}
    stats = {"toy_robot": {"action": action, "proprio": proprio}}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="session")
def oft_policy(oft_folder):
    return mlx_tokprune.load(oft_folder)


@pytest.fixture
def checkpoint(tmp_path):
    """Return the folder of a writable copy of the tiny checkpoint."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder)
    for path in TINY.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


_PLACES = (
    *("0.blocks", "1.downsample", "1.blocks", "2.downsample", "2.blocks"),
    *("3.downsample", "3.pos_emb", "3.blocks"),
    *("4.downsample", "4.pos_emb", "4.blocks"),
)
_TIMM = {f".network.{i}.": f".stages.{place}." for i, place in enumerate(_PLACES)} | {
    **{"model.vision_tower.vision_tower.model.": "model.vision_tower.timm_model."},
    **{"model.layers.": "model.language_model.layers."},
    **{"model.norm.": "model.language_model.norm."},
    **{"model.embed_tokens.": "model.language_model.embed_tokens."},
    **{"model.mm_projector.0.": "model.multi_modal_projector.linear_1."},
    **{"model.mm_projector.2.": "model.multi_modal_projector.linear_2."},
    **{".patch_embed.": ".stem.", ".conv_exp.": ".final_conv.", ".convffn.": ".mlp."},
    **{".se.reduce.": ".se.fc1.", ".se.expand.": ".se.fc2."},
    ".lkb_reparam.": ".reparam_conv.",
}


def _timm_name(apple: str) -> str:
    for theirs, name in _TIMM.items():
        apple = apple.replace(theirs, name)
    return f"{apple}.gamma" if ".layer_scale" in apple else apple


@pytest.fixture
def fast_vlm(checkpoint):
    """Return the tiny checkpoint in the layout that transformers saves."""
    file = str(checkpoint / "model.safetensors")
    weights = {
        _timm_name(n): mx.array(a)
        for n, a in mx.load(file).items()
        if ".head." not in n
    }
    mx.eval(weights)
    mx.save_safetensors(file, weights)
    config = json.loads((TINY / "config.json").read_text())
    sizes = config["vision_config"]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    names += ("max_position_embeddings", "eos_token_id")
    text = {name: config[name] for name in names}
    arguments = {k: sizes[k] for k in ("layers", "embed_dims", "mlp_ratios")}
    theirs = {
        "model_type": "fast_vlm",
        "dtype": "float32",
        "vision_feature_layer": -1,
        "text_config": text
        | {"model_type": "qwen2", "rope_parameters": {"rope_theta": 1000000.0}},
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "image_size": sizes["image_size"],
            "model_args": arguments | {"inference_mode": True},
        },
    }
    (checkpoint / "config.json").write_text(json.dumps(theirs))
    return checkpoint


def read_manifest(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


MANIFESTS = sorted((DATA / "manifests").glob("FastVLM*.json.gz"))


def write_headers(folder: Path, tensors: dict, config: dict, shards: int = 2) -> None:
    """Write a checkpoint of these shapes as sparse files without data."""
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


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """Return a factory of demo-model Core ML packages, each written once."""
    from mlx_tokprune.checkpoints.hub import EMBEDDED
    from mlx_tokprune.coreml.export import ExportOptions, export_package

    folder, made = tmp_path_factory.mktemp("packages"), {}
    model, _ = mlx_tokprune.load("demo", mx.float32)

    def package(method: str, ratios=(0.5,), options=None) -> Path:
        options = options or ExportOptions(precision="float32")
        key = (method, ratios, options)
        if key not in made:
            made[key] = folder / f"{len(made)}.mlpackage"
            pruners = [
                mlx_tokprune.Pruner(method, keep_ratio=ratio) for ratio in ratios
            ]
            export_package(model, pruners, made[key], options, EMBEDDED["demo"])
        return made[key]

    return package
