"""The settings that make two runs of `evaluate` equal, and the files of a run."""

import json

import pytest

from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.evaluate import items as data
from mlx_tokprune.evaluate.__main__ import main
from mlx_tokprune.evaluate.evaluator import describe_run


def test_what_is_needed_and_its_kind_are_part_of_a_question(demo):
    def digest(**more) -> str:
        item = data.Item("picture", "What?", ("a",), image=PICTURES[0].path, **more)
        return describe_run(demo[0], [item], [])["questions"]

    assert len({digest(), digest(needed=(1,)), digest(kind="count")}) == 3


def test_journals_of_other_outputs_stay(tmp_path):
    other = tmp_path / "r1.json.0-of-1.jsonl"
    other.write_text("mine")
    few = ["--pictures", "1", "--methods", "norm", "--keep-ratios", "0.5"]
    main([*few, "--output", str(tmp_path / "r[1].json")])
    assert other.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {other.name, "r[1].json"}


def test_kv_groups_are_part_of_a_run(tmp_path):
    few = ["--pictures", "1", "--methods", "norm", "--keep-ratios", "0.5"]
    for options, size in (
        ([], None),
        (["--kv-bits", "8", "--kv-group-size", "32"], 32),
    ):
        main([*few, *options, "--output", str(tmp_path / "r.json")])
        run = json.loads((tmp_path / "r.json").read_text())["run"]
        assert run["kv_group_size"] == size


def test_a_kind_cannot_break_the_table(tmp_path, capsys):
    line = {"image": str(PICTURES[0].path), "question": "What?", "answer": "EAST"}
    (tmp_path / "l.jsonl").write_text(json.dumps(line | {"kind": "a|b\x1b"}))
    few = [
        "--data",
        str(tmp_path / "l.jsonl"),
        "--methods",
        "norm",
        "--keep-ratios",
        "0.5",
    ]
    main([*few, "--output", str(tmp_path / "r.json")])
    shown = capsys.readouterr().out
    head = next(text for text in shown.splitlines() if text.startswith("| method"))
    assert head.count("|") == 8
    assert "\x1b" not in shown


def test_a_size_of_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--image-size", "0", "--output", str(tmp_path / "r.json")])
    assert capsys.readouterr().err.startswith("error: ")
