"""A Core ML package as the vision path of `generate`, with `mil.py` as Core ML."""

import json
import shutil
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import COREMLTOOLS_WARNINGS, needs_coremltools

import mlx_tokprune
from mlx_tokprune import generate
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.coreml import vision
from mlx_tokprune.coreml.describe import read_functions
from mlx_tokprune.coreml.export import ExportOptions
from mlx_tokprune.errors import InputError
from mlx_tokprune.generate.__main__ import main as generate_command

needs_coremltools()

from mil import Package  # noqa: E402

pytestmark = COREMLTOOLS_WARNINGS


@pytest.fixture(scope="module")
def demo():
    return mlx_tokprune.load("demo", mx.float32)


@pytest.fixture(scope="module")
def policy():
    return mlx_tokprune.load("demo-policy", mx.float32)


class Stand:
    """Stand-in of Core ML's `predict` that runs the interpreter."""

    def __init__(self, path, function):
        self.package, self.function = Package(path), function

    def __call__(self, inputs):
        ((name, value),) = inputs.items()
        if name == "image":
            value = np.asarray(value, np.float32).transpose(2, 0, 1)[None]
        return self.package.predict({name: value}, self.function)


@pytest.fixture
def core_ml(monkeypatch):
    monkeypatch.setattr(vision, "_predict", lambda ct, path, name: Stand(path, name))


@pytest.mark.parametrize("apple", [False, True])
def test_generate_with_a_package(core_ml, packages, capsys, apple):
    if apple:
        options = ExportOptions(projector=False, image=False, precision="float32")
        path, ratio = packages("norm", options=options), 0.5
    else:
        path, ratio = packages("norm", (0.5, 0.25, 0.125)), 0.25
    records = []
    for arguments in (["--vision", str(path)], ["--method", "norm"]):
        asked = ["--json", "--stages", "--keep-ratio", str(ratio)]
        generate_command([*asked, *arguments])
        records.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    same = ("text", "token_ids", "kept_indices", "visual_tokens", "method", "keep")
    assert [records[0][key] for key in same] == [records[1][key] for key in same]
    assert records[0]["stages_ms"]["prune"] == 0
    assert records[1]["stages_ms"]["prune"] > 0


def test_a_package_must_fit_question_and_model(core_ml, packages, demo, tiny, policy):
    path = packages("norm", (0.5, 0.25, 0.125))
    with pytest.raises(InputError, match=r"0.4 of the visual tokens; it has 0.5, 0.25"):
        vision.open_vision(path, 0.4)
    package = vision.open_vision(path)
    with pytest.raises(InputError, match="gives features of size 192"):
        package.check(tiny[0])
    with pytest.raises(InputError, match="pictures of 512 pixels"):
        package.check(policy[0])
    with pytest.raises(InputError, match="is no Core ML package"):
        vision.open_vision(path.parent)
    model, processor = demo
    wide = (model, processor.at(512, "skip"), [PICTURES[0].path], "What?")
    with pytest.raises(InputError, match="512 x 512 pixels, not 512 x 320"):
        generate(*wide, vision=package)


def test_a_package_of_someone_else_is_refused(core_ml, packages, tmp_path):
    path = tmp_path / "other.mlpackage"
    shutil.copytree(packages("norm"), path)
    (file,) = path.glob("Data/*/*.mlmodel")
    spec = Package(path).spec
    del spec.description.metadata.userDefined["mlx_tokprune"]
    file.write_bytes(spec.SerializeToString())
    with pytest.raises(InputError, match="was not written by mlx_tokprune"):
        vision.open_vision(path)


@pytest.mark.skipif(sys.platform == "darwin", reason="says what other systems say")
def test_core_ml_is_macos_only(packages, capsys):
    with pytest.raises(SystemExit):
        generate_command(["--vision", str(packages("norm"))])
    assert "Core ML runs on macOS only" in capsys.readouterr().err


def test_vision_and_method_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        generate_command(["--vision", "v", "--method", "norm"])
    assert "a package has its own method" in capsys.readouterr().err


def test_a_damaged_package_is_refused(core_ml, packages, tmp_path):
    path = tmp_path / "damaged.mlpackage"
    path.mkdir()
    (path / "Manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        vision.open_vision(path)
    spec = Package(packages("norm")).spec
    about = spec.description.metadata.userDefined
    about["mlx_tokprune"] = '[{"name": "main"}]'
    with pytest.raises(InputError, match="another version of mlx_tokprune"):
        read_functions(spec, "it")


def test_the_ratio_that_an_error_names_is_found():
    """A ratio rounded to the six digits of the error message is found."""
    share = 33 / 256
    made = [SimpleNamespace(share=share), SimpleNamespace(share=0.5)]
    for asked in (share, 0.128906, None):
        assert vision._choose(made, asked, "package") is made[0]
    with pytest.raises(InputError, match=r"it has 0\.128906, 0\.5"):
        vision._choose(made, 0.1289, "package")
