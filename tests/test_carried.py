"""Checkpoints that carry their pruners: read, converted, turned off, refused."""

import json
import shutil

import pytest
from conftest import TINY_POLICY

from mlx_tokprune import (
    InputError,
    Policy,
    Pruner,
    generate,
    load,
    predict_action,
    stream_generate,
)
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.convert import convert
from mlx_tokprune.convert.__main__ import main as convert_main
from mlx_tokprune.generate.__main__ import main as generate_main
from mlx_tokprune.train.lora import write_fused

PICTURE, QUESTION = PICTURES[0].path, PICTURES[0].question


@pytest.fixture(scope="module")
def carrying(tmp_path_factory):
    """Return the demo checkpoint with a plan: a scorer, then a method in a layer."""
    folder = tmp_path_factory.mktemp("carried") / "demo"
    plan = ["--prune", "demo-adaptive:0.1", "--prune", "attention:0.5@2"]
    convert_main(["--hf-path", "demo", "--mlx-path", str(folder), *plan])
    return folder


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def kept(loaded, **options) -> list:
    pieces = stream_generate(*loaded, [PICTURE], QUESTION, **options)
    return [(p.token, p.visual.by_place()) for p in pieces]


def test_prunes_when_loaded_by_what_was_said(carrying, demo):
    loaded = load(carrying)
    plan = [Pruner("demo-adaptive", 0.1), Pruner("attention", 0.5, at=2)]
    assert kept(loaded) == kept(demo, pruner=plan)
    assert kept(loaded) != kept(demo)
    assert kept(loaded, pruner=Pruner("none")) == kept(demo)
    assert kept(loaded, pruner=()) == kept(demo)
    assert generate(*loaded, [PICTURE], QUESTION) == generate(
        *demo, [PICTURE], QUESTION, pruner=plan
    )


def test_survives_being_converted_moved_and_fused(carrying, tmp_path, demo):
    again = convert(str(carrying), str(tmp_path / "again"), quantize=True)
    assert config_of(again)["pruner"] == config_of(carrying)["pruner"]
    moved = tmp_path / "moved"
    shutil.move(again, moved)
    assert [p.at for p in load(moved)[0].carried] == ["tower", 2]
    from mlx_tokprune.checkpoints.opening import open_checkpoint

    write_fused(open_checkpoint(carrying), {}, tmp_path / "fused")
    assert kept(load(tmp_path / "fused")) == kept(load(carrying))
    plain = convert(str(carrying), str(tmp_path / "plain"), pruner=())
    assert "pruner" not in config_of(plain)
    assert kept(load(plain)) == kept(demo)


def test_commands_use_it_and_turn_it_off(carrying, capsys):
    asked = ["--model", str(carrying), "--image", str(PICTURE), "--prompt", QUESTION]

    def record(*options) -> dict:
        generate_main([*asked, "--json", *options])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    own = record()
    assert [place["at"] for place in own["places"]] == ["tower", 2]
    assert own["keep"] == 3
    assert record("--method", "none")["keep"] == 64
    assert record("--keep-ratio", "0.5")["keep"] == 32


def test_a_policy_gets_its_own_method(tmp_path):
    source = str(TINY_POLICY)
    folder = convert(source, str(tmp_path / "own"), pruner=Pruner("trimvla"))
    picture = [TINY_POLICY / "image_0.png"]
    loaded, plain = load(folder), load(source)
    wanted = predict_action(*plain, picture, "stop", pruner=Pruner("trimvla"))
    action = predict_action(*loaded, picture, "stop")
    assert action.visual.left() == wanted.visual.left()
    assert len(action.visual.left()[0]) < action.visual.total
    policy = Policy(*loaded)
    assert policy(picture, "stop").tolist() == action.values.tolist()
    assert policy.kept == len(wanted.visual.left()[0])


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"method": "norm"}, "no list of objects"),
        ([{"keep_ratio": 0.5}], "names no method"),
        ([{"method": "norm", "scorer": "scorer-0"}], "or two"),
        ([{"method": "norm", "keep": 0.5}], "has 'keep'"),
        ([{"method": "os:system", "keep_ratio": 0.5}], "code would have to be run"),
        ([{"method": "../elsewhere", "keep_ratio": 0.5}], "code would have to be run"),
        ([{"scorer": "../scorer-0", "keep_ratio": 0.5}], "folder of a scorer in that"),
        ([{"scorer": "missing", "keep_ratio": 0.5}], "folder of a scorer in that"),
        ([{"scorer": 3, "keep_ratio": 0.5}], "folder of a scorer in that"),
        ([{"method": "norm", "keep_ratio": 1.5}], "outside"),
        ([{"method": "norm", "keep_ratio": 0.5}] * 2, "one pruner for each place"),
    ],
)
def test_what_a_config_cannot_say(carrying, tmp_path, section, match):
    folder = tmp_path / "bad"
    shutil.copytree(carrying, folder)
    config = config_of(folder) | {"pruner": section}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=match):
        load(folder)


def test_a_scorer_behind_a_link_that_leaves_the_folder(carrying, tmp_path):
    folder = tmp_path / "linked"
    shutil.copytree(carrying, folder)
    shutil.move(folder / "scorer-0", tmp_path / "outside")
    (folder / "scorer-0").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="folder of a scorer in that"):
        load(folder)


def test_code_of_ones_own_is_not_carried(tmp_path, monkeypatch):
    (tmp_path / "carried_own.py").write_text("def odd(features, *, keep):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    target = str(tmp_path / "target")
    with pytest.raises(InputError, match="cannot carry the code"):
        convert("demo", target, pruner=Pruner("carried_own:odd", 0.5))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("plan", ["attention:0.5@999", "cdpruner:0.5@tower"])
def test_what_the_model_cannot_do_is_not_carried(tmp_path, plan, capsys):
    target = tmp_path / "target"
    with pytest.raises(SystemExit):
        convert_main(["--hf-path", "demo", "--mlx-path", str(target), "--prune", plan])
    assert "error" in capsys.readouterr().err
    assert not target.exists()
