"""Models and options that cannot be exported to Core ML are refused in a sentence."""

import dataclasses
import os
import re
import sys

import mlx.core as mx
import pytest
from conftest import COREMLTOOLS_WARNINGS, TINY, needs_coremltools

import mlx_tokprune
from mlx_tokprune import Pruner
from mlx_tokprune.convert import convert
from mlx_tokprune.coreml import __main__ as cli
from mlx_tokprune.coreml import export, lower
from mlx_tokprune.coreml.export import ExportOptions, export_package
from mlx_tokprune.errors import InputError

needs_coremltools()

pytestmark = COREMLTOOLS_WARNINGS


@pytest.fixture(scope="module")
def demo():
    return mlx_tokprune.load("demo", mx.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no keep ratio was given; expected one, such as --keep-ratio 0.5"),
        (["--keep-ratio", "1"], "a keep ratio of 1 drops nothing"),
        (["--prune", "norm:1"], "a keep ratio of 1 drops nothing"),
        (["--prune", "norm:.5@2"], "'norm' prunes inside the language model"),
        (["--method", "norm"], "no keep ratio was given"),
        (["--keep-ratio", "0"], "outside (0, 1]"),
        (["--keep-tokens", "64"], "all 64 visual tokens would be kept"),
        (["--keep-tokens", "65"], "the most is 64"),
        (["--keep-ratio", ".5", "--method", "nrom"], "Did you mean 'norm'?"),
        (["--keep-ratio", ".5", ".5"], "keep_50 was requested more than once"),
        (
            ["--keep-ratio", ".5", "--method", "trimvla"],
            "does not have; the nearest method that can be exported is 'attention'",
        ),
        (["--method", "lightvla", "--keep-ratio", ".5"], "decides itself how many"),
        (
            ["--method", "dart", "--keep-ratio", ".5"],
            "'dart' prunes at the prompt, which comes after a vision package, but can "
            "prune at the tower; expected --at tower",
        ),
        (
            ["--method", "fastv", "--keep-ratio", ".5"],
            "'fastv' prunes inside the language model, which a vision package does not "
            "hold; expected a pruner at the tower, such as 'attention'",
        ),
        (
            ["--method", "trimvla", "--keep-ratio", ".5", "--at", "tower"],
            "needs queries, text_keys, which this model does not have at 'tower'",
        ),
        (["--keep-ratio", ".5", "--at", "prompt"], "choose from"),
        (["--keep-ratio", ".5", "--target", "iOS15"], "Did you mean 'iOS18'?"),
        (["--keep-ratio", ".5", "--precision", "int8"], "expected one of float16"),
        (["--keep-ratio", ".5", "--compress", "5bit"], "expected one of 8bit"),
        (
            ["--keep-ratio", ".5", "--compress", "4bit", "--precision", "float32"],
            "palettes of float16",
        ),
        (["--keep-ratio", ".5", "--compute-plan"], "only Core ML on macOS")
        if sys.platform != "darwin"
        else (["--keep-ratio", "2"], "outside (0, 1]"),
        (["--keep-ratio", ".5", "--model", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--output", str(tmp_path / "v.mlpackage")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (Pruner("prumerge"), "'prumerge' without a budget decides for each picture"),
        (Pruner("prumerge_plus"), "'prumerge_plus' without a budget decides"),
        (
            Pruner("similarity", options={"threshold": 0.9}),
            "'similarity' with a threshold decides for each picture how many visual "
            "tokens to keep, and a package has fixed shapes; expected a keep ratio",
        ),
        (Pruner("lightvla"), "'lightvla' reads the prompt"),
        (Pruner("cdpruner", keep_ratio=0.5), "'cdpruner' reads the prompt"),
        (Pruner("norm", 0.5, at="prompt"), "'norm' prunes at the prompt"),
        (Pruner("attention", 0.5, at=2), "inside the language model, which a vision"),
        (Pruner("pyramiddrop", 0.5), "'pyramiddrop' prunes inside the language model"),
        (Pruner("sparsevlm", 0.5), "'sparsevlm' prunes inside the language model"),
    ],
    ids=lambda value: value.method if isinstance(value, Pruner) else "",
)
def test_what_a_package_cannot_hold_is_refused(
    demo, tmp_path, monkeypatch, pruner, message
):
    monkeypatch.setattr(export, "capture", None)  # refused before anything is traced
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        export_package(demo[0], [pruner], tmp_path / "v.mlpackage")
    assert len(str(raised.value).splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_output_names_and_output_that_exists(tmp_path, capsys):
    taken = tmp_path / "v.mlpackage"
    taken.mkdir()
    for path, message in ((taken, "already exists"), (tmp_path / "v", ".mlpackage")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--keep-ratio", "0.5", "--output", str(path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["v.mlpackage"]


def test_python_callers_get_a_sentence_too(demo, tmp_path):
    path = tmp_path / "v.mlpackage"
    with pytest.raises(InputError, match="no pruner was given"):
        export_package(demo[0], [], path)
    half = mlx_tokprune.load("demo", mx.bfloat16)[0]
    with pytest.raises(InputError, match=r"bfloat16; load it with dtype=mx.float32"):
        export_package(half, [Pruner("none")], path)
    with pytest.raises(InputError, match="unknown compression ''"):
        ExportOptions(compress="")
    assert not os.listdir(tmp_path)


def test_a_package_can_be_read_by_all(packages):
    for part in packages("norm").rglob("*"):
        assert part.stat().st_mode & 0o777 == (0o755 if part.is_dir() else 0o644)


def test_without_coremltools(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--keep-ratio", "0.5", "--output", str(tmp_path / "v.mlpackage")])
    assert stopped.value.code == 2
    assert "pip install 'mlx-tokprune[coreml]'" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_tower_that_reads_the_instruction_is_refused(oft_policy, tmp_path):
    model = oft_policy[0]
    film = dataclasses.replace(model.args.oft, film=True)
    args = dataclasses.replace(model.args, oft=film)
    known = {"args": args, "reads_prompt": type(model).reads_prompt}
    stand_in = type("Model", (), known)()
    with pytest.raises(InputError, match="FiLM"):
        export_package(stand_in, [Pruner("none")], tmp_path / "v.mlpackage")


def test_a_failure_leaves_nothing(demo, tmp_path, monkeypatch):
    monkeypatch.delitem(lower.TABLE, "Softmax")
    with pytest.raises(InputError, match="Softmax"):
        export_package(demo[0], [Pruner("none")], tmp_path / "v.mlpackage")
    assert not os.listdir(tmp_path)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "v.mlpackage"
    cli.main(["--model", str(TINY), "--keep-ratio", "0.5", "--output", str(path)])
    shown = capsys.readouterr().out
    assert "norm, 32 of 64 visual tokens -> image_features (1, 32, 64)" in shown
    assert os.listdir(tmp_path) == ["v.mlpackage"]


def test_the_command_for_a_checkpoint_that_carries_a_pruner(tmp_path, capsys):
    convert("demo", str(tmp_path / "half"), pruner=Pruner("norm", 0.5))
    convert("demo", str(tmp_path / "inside"), pruner=Pruner("attention", 0.5, at=2))
    package = str(tmp_path / "half.mlpackage")
    cli.main(["--model", str(tmp_path / "half"), "--output", package])
    assert "norm, 32 of 64 visual tokens" in capsys.readouterr().out
    package = str(tmp_path / "inside.mlpackage")
    with pytest.raises(SystemExit):
        cli.main(["--model", str(tmp_path / "inside"), "--output", package])
    assert "inside the language model, which a vision" in capsys.readouterr().err


def test_the_command_for_a_method_of_another_place(tmp_path, capsys):
    path = tmp_path / "v.mlpackage"
    budget = ["--method", "dart", "--at", "tower", "--keep-tokens", "8"]
    cli.main(["--model", str(TINY), *budget, "--output", str(path)])
    assert "dart, 8 of 64 visual tokens" in capsys.readouterr().out
