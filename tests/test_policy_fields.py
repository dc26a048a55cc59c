"""Every field that the references read from a policy's files is in `policy_fields`.

A test changes each field and sees the effect, or the sentence that refuses it.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY_CHUNKS, TINY_POLICY, copy_policy, side_tensors
from policy_fields import BEFORE, CONFIG, FIELDS, IMAGES, NORM_STATS, STATISTICS, Field

from mlx_tokprune import load
from mlx_tokprune.checkpoints.opening import open_checkpoint
from mlx_tokprune.errors import InputError


def make(policy: str, folder: Path) -> Path:
    """Write the tiny checkpoint of a kind of policy; return its folder."""
    if policy in ("openvla", "oft"):
        copy_policy(folder)
        if policy == "oft":
            weights = mx.load(str(folder / "model.safetensors")) | side_tensors(
                proprio=7
            )
            mx.eval(weights)
            mx.save_safetensors(str(folder / "model.safetensors"), weights)
        return folder
    shutil.copytree(TINY_CHUNKS, folder)
    config = json.loads((folder / CONFIG).read_text())
    if policy == "openpi":
        for name in (*folder.glob("policy_*"),):
            name.unlink()
        config = {"vision_config": config["vision_config"], "action_dim": 3}
        (folder / CONFIG).write_text(json.dumps(config))
        part = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
        stats = {
            k: {n: v * s for n, v in part.items()}
            for k, s in (("actions", 3), ("state", 2))
        }
        (folder / NORM_STATS).parent.mkdir(parents=True)
        (folder / NORM_STATS).write_text(json.dumps({"norm_stats": stats}))
    return folder


def begin(field: Field, folder: Path) -> Any:
    """Return the content of the field's file before the change."""
    file = folder / field.file
    if field.file == STATISTICS:
        numbers = {n: [v] * 7 for n, v in (("q01", -1.0), ("q99", 1.0))}
        numbers |= {"min": [-2.0] * 7, "max": [2.0] * 7}
        return {"toy": {"action": dict(numbers), "proprio": dict(numbers)}}
    return json.loads(file.read_text()) if file.exists() else {"steps": []}


def change(content: Any, path: tuple, value: Any) -> None:
    *parents, last = path
    for key in parents:
        content = (
            content.setdefault(key, {}) if isinstance(content, dict) else content[key]
        )
    if isinstance(content, list) and last == len(content):
        content.append(value)
    else:
        content[last] = value


def read(folder: Path) -> tuple[Any, dict]:
    """Return the checked config of a checkpoint, and all of it."""
    family, _, config = open_checkpoint(folder)
    return family.args.from_dict(config), config


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_a_field_is_followed_or_refused_or_has_a_reason(tmp_path, field):
    folder = make(field.policy, tmp_path / "p")
    content, file = begin(field, folder), folder / field.file
    file.write_text(json.dumps(content))
    before = read(folder)
    change(content, field.path, field.value)
    file.write_text(json.dumps(content))
    if isinstance(field.effect, str):
        with pytest.raises(InputError, match=field.effect):
            read(folder)
        return
    after = read(folder)
    if field.effect is None:
        assert field.reason
        assert dataclasses.asdict(before[0]) == dataclasses.asdict(after[0])
        assert before[1].get("image_processing") == after[1].get("image_processing")
        return
    look, value = field.effect
    assert look(*after) == value
    try:
        assert look(*before) != value
    except LookupError:
        pass  # the entry is new


@pytest.mark.parametrize(
    ("policy", "name", "source"),
    [
        ("openvla", CONFIG, TINY_POLICY),
        ("openvla", IMAGES, TINY_POLICY),
        ("lerobot", CONFIG, TINY_CHUNKS),
        ("lerobot", BEFORE, TINY_CHUNKS),
    ],
)
def test_every_field_of_the_files_is_in_the_table(policy, name, source):
    listed = {f.path[0] for f in FIELDS if (f.policy, f.file) == (policy, name)}
    notes = {"state", "statistics", "openpi_prompt"}  # of the golden values
    assert json.loads((source / name).read_text()).keys() - notes <= listed


def test_a_norm_of_the_caller_counts(tmp_path):
    folder = make("openpi", tmp_path / "p")
    notes = open_checkpoint(folder).checkpoint.notes
    assert "quantiles is used: openpi's default" in notes[0]
    source = open_checkpoint(folder, settings={"norm": "mean_std"})
    assert not source.checkpoint.notes
    assert set(source.config["policy"]["rules"].values()) == {"mean_std"}


def test_mean_and_deviation_are_openpi_s(tmp_path):
    """openpi adds 1e-6 to the deviation, both ways."""
    folder = make("openpi", tmp_path / "p")
    stats = json.loads((folder / NORM_STATS).read_text())
    stats["norm_stats"]["actions"] |= {"mean": [0.5] * 3, "std": [1e-6] * 3}
    (folder / NORM_STATS).write_text(json.dumps(stats))
    _, processor = load(folder, settings={"norm": "mean_std"})
    scale = processor.bounds("action", None)
    assert scale.to_units(scale.mean * 0 + 1) == pytest.approx(0.5 + 2e-6, abs=1e-9)


def test_pictures_that_config_json_normalises_are_refused(tmp_path):
    """Without a processor's file, config.json's mapping counts."""
    folder = make("lerobot", tmp_path / "p")
    (folder / BEFORE).unlink()
    config = json.loads((folder / CONFIG).read_text())
    config["normalization_mapping"]["VISUAL"] = "MIN_MAX"
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="normalises VISUAL by 'MIN_MAX'"):
        read(folder)
