"""OpenVLA and Prismatic checkpoints: key table, statistics and side files.

The MLX layout, defined here, keeps the reference names. Convolutions are channels-last.
SigLIP's attention pooling is left out, as no feature depends on it.
"""

import re
from collections.abc import Mapping

from ..checkpoints.family import Family, Shape, register_family
from ..checkpoints.shards import Checkpoint
from ..errors import InputError
from ..files import object_of, read_json
from ..models.openvla import ModelArgs, OpenVLA
from .oft_adapter import add_adapter
from .sidefiles import add_side_files

# Prismatic names -> MLX names.
_KEYS: tuple[tuple[str, str | None], ...] = (
    (r".*\.rotary_emb\.inv_freq$", None),
    (r"^vision_backbone\.(fused_)?featurizer\.attn_pool\.", None),
    (r"^module\.", ""),
)
_PATCHES = re.compile(
    r"^vision_backbone\.(fused_)?featurizer\.patch_embed\.proj\.weight$"
)

# Actions per forward pass, images and normalisation of OFT's robots, which its
# checkpoints do not record. From prismatic/vla/constants.py of
# github.com/moojink/openvla-oft.
_ROBOTS = {
    "libero": {"chunk": 8, "pictures": 2, "rule": "bounds_q99"},
    "aloha": {"chunk": 25, "pictures": 3, "rule": "bounds"},
    "bridge": {"chunk": 5, "pictures": 1, "rule": "bounds_q99"},
}


def _matches(checkpoint: Checkpoint) -> bool:
    names = checkpoint.tensors
    return any(n.startswith("vision_backbone.featurizer.") for n in names)


def _gather(
    family: Family, checkpoint: Checkpoint, adapter: str
) -> tuple[Family, Checkpoint]:
    """Add OpenVLA-OFT's side files and its `lora_adapter/` to the checkpoint.

    adapter: mode of `lora_adapter/` (`oft_adapter.add_adapter`).
    """
    return family, add_adapter(add_side_files(checkpoint), adapter)


def _is_mlx(shapes: Mapping[str, Shape]) -> bool:
    patches = [s for n, s in shapes.items() if _PATCHES.match(n)]
    return all(len(s) == 4 and s[3] == 3 and s[1] != 3 for s in patches)


def _axes(name: str, ndim: int) -> tuple[int, ...] | None:
    return (0, 2, 3, 1) if _PATCHES.match(name) and ndim == 4 else None


def _complete(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> dict:
    config = dict(checkpoint.config)
    folder = checkpoint.folder
    if (folder / "preprocessor_config.json").exists():
        config["preprocessor"] = read_json(folder / "preprocessor_config.json")
    if (folder / "dataset_statistics.json").exists():
        config["norm_stats"] = read_json(folder / "dataset_statistics.json")
    stats = config.setdefault("norm_stats", {})
    if not isinstance(stats, dict):
        raise InputError(
            f"norm_stats of {folder} is no object; expected one entry per data set"
        )
    text = config.get("text_config")
    if isinstance(text, dict):
        tied = "language_model.lm_head.weight" not in shapes
        config["text_config"] = text | {"tie_word_embeddings": tied}
    if "action_head.model.fc2.weight" in shapes:
        config["oft"] = _oft(checkpoint, config, shapes)
    return config


def _oft(checkpoint: Checkpoint, config: dict, shapes: dict[str, Shape]) -> dict:
    """Return an OFT policy's settings: from the tensors, else its robot's defaults."""
    action_dim = shapes["action_head.model.fc2.weight"][0]
    words = " ".join([checkpoint.folder.name, *config["norm_stats"]]).lower()
    # Guess the robot by name; only ALOHA, with two arms, has 14 action dimensions.
    named = [robot for robot in _ROBOTS if robot in words]
    robot = named[0] if named else "aloha" if action_dim == 14 else "libero"
    stored = object_of(config, "oft")
    proprio = shapes.get("proprio_projector.fc1.weight", (0, 0))[-1]
    film = "vision_backbone.featurizer.blocks.0.scale.weight" in shapes
    defaults = _ROBOTS[robot] | {"crop": 0.9}
    return (
        defaults
        | stored
        | {
            "action_dim": action_dim,
            "proprio_dim": proprio,
            "film": film,
        }
    )


OPENVLA = register_family(
    Family(
        name="OpenVLA",
        model=OpenVLA,
        args=ModelArgs,
        matches=_matches,
        gather=_gather,
        takes_adapter=True,
        reads=(
            "OpenVLA, OpenVLA-OFT and Prismatic checkpoints with one or two vision "
            "towers (such as openvla/openvla-7b)"
        ),
        is_mlx=_is_mlx,
        keys=_KEYS,
        axes=_axes,
        complete=_complete,
    )
)
