"""The command `mlx_tokprune generate`: report, JSON, and one-line refusals."""

import argparse
import importlib
import json
import logging
import re
import shlex
import shutil

import pytest
from conftest import TINY
from PIL import Image

import mlx_tokprune
from mlx_tokprune import __main__ as program
from mlx_tokprune import list_pruners
from mlx_tokprune.cli import plan_of, row_plans
from mlx_tokprune.generate.__main__ import main
from mlx_tokprune.pruners import read_plan, registry

PICTURE = str(TINY / "image_1.png")
ASK = ["--model", str(TINY), "--image", PICTURE, "--prompt", "What?"]
FIELDS = {
    "text",
    "token_ids",
    "visual_tokens",
    "kept_indices",
    "stages_ms",
    "ttft_ms",
    "decode_tokens_per_second",
    "calls",
    "peak_memory_mb",
    "method",
    "keep",
    "places",
    "positions",
    "device",
    "image_size",
    "padding",
    "encoded",
    "prompt",
    "reused_tokens",
}


def run_json(capsys, *options: str) -> dict:
    main([*ASK, "--max-tokens", "4", "--json", *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json_has_what_is_promised(capsys):
    record = run_json(capsys, "--keep-ratio", "0.25", "--stages")
    assert record.keys() == FIELDS
    assert record["method"] == "norm"
    assert record["positions"] == "original"
    assert (record["visual_tokens"], record["keep"]) == (64, 16)
    assert len(record["kept_indices"][0]) == 16
    assert len(record["token_ids"]) == 4
    stages = ["preprocess", "vision", "prune", "project", "prefill"]
    assert list(record["stages_ms"]) == stages
    assert all(ms > 0 for ms in record["stages_ms"].values())
    assert record["ttft_ms"] > 0
    assert record["peak_memory_mb"] > 0
    # Without --stages, no stage waits for the one before.
    plain = run_json(capsys, "--keep-ratio", "0.25")
    assert plain.keys() == FIELDS
    assert plain["stages_ms"] is None
    assert plain["token_ids"] == record["token_ids"]


def test_report_for_people(capsys):
    asked = [*ASK, "--max-tokens", "2", "--keep-tokens", "10", "--method", "attention"]
    main([*asked, "--stages"])
    out = capsys.readouterr().out
    assert "kept 10 (attention, original positions)" in out
    stages = ("preprocess", "vision", "prune", "project", "prefill")
    for word in (*stages, "ms (one by one)", "slowed by --stages"):
        assert word in out
    main(asked)
    out = capsys.readouterr().out
    assert "prefill" not in out
    assert "fenced" not in out
    for word in ("TTFT", " ms", "tokens/s", "MB"):
        assert word in out


def test_several_pictures_and_an_overlay(capsys, tmp_path):
    path = tmp_path / "kept.png"
    record = run_json(
        capsys,
        *("--image", str(TINY / "image_0.png"), "--overlay", str(path)),
        *("--method", "similarity", "--keep-tokens", "9"),
    )
    assert [len(k) for k in record["kept_indices"]] == [9, 9]
    with Image.open(path) as overlay:
        assert overlay.width > overlay.height


@pytest.mark.parametrize("folder", [False, True])
def test_each_picture_is_asked_about_alone(capsys, tmp_path, folder):
    pictures = [tmp_path / f"{number}.png" for number in range(2)]
    for number, picture in enumerate(pictures):
        shutil.copyfile(TINY / f"image_{number}.png", picture)
    asked = [tmp_path] if folder else pictures
    asked = [text for place in asked for text in ("--image", str(place))]
    how = ["--prompt", "What?", "--max-tokens", "4", "--json"]
    main(["--model", str(TINY), *asked, *how, *["--each"] * (not folder)])
    out = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in out if line.startswith("{")]
    assert [record["image"] for record in records] == list(map(str, pictures))
    for picture, record in zip(pictures, records, strict=True):
        assert record.keys() == FIELDS | {"image"}
        main(["--model", str(TINY), "--image", str(picture), *how])
        alone = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert alone.keys() == FIELDS
        assert record["token_ids"] == alone["token_ids"]


def test_a_method_of_one_s_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import mlx.core as mx\n"
        "from mlx_tokprune import Selection\n"
        "def every(features, *, keep, step=1):\n"
        "    kept = int(step) * mx.arange(keep, dtype=mx.int32)\n"
        "    return Selection(mx.broadcast_to(kept, (len(features.tokens), keep)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_METHODS", "_NAMES"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    how = ["--method", "mine:every", "--keep-tokens", "9", "--option", "step=7"]
    record = run_json(capsys, *how)
    assert record["method"] == "mine:every"
    assert record["kept_indices"] == [list(range(0, 63, 7))]


def test_a_log_is_written_where_it_is_asked_for(capsys, caplog):
    main([*ASK, "--max-tokens", "1"])
    assert not caplog.messages
    try:
        main([*ASK, "--max-tokens", "1", "--verbose"])
    finally:
        logging.getLogger("mlx_tokprune").setLevel(logging.NOTSET)
    assert any("first token after" in message for message in caplog.messages)


def test_sampling_is_seeded(capsys):
    hot = ["--temp", "5", "--top-p", "0.99"]
    one = run_json(capsys, *hot, "--seed", "1")["token_ids"]
    assert one == run_json(capsys, *hot, "--seed", "1")["token_ids"]
    others = [run_json(capsys, *hot, "--seed", str(s))["token_ids"] for s in (2, 3, 4)]
    assert any(other != one for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratio", "1.5"], "keep ratio 1.5 is outside (0, 1]"),
        (["--keep-ratio", "0"], "keep ratio 0 is outside (0, 1]"),
        (["--keep-tokens", "65"], "cannot keep 65 visual tokens; there are 64"),
        (["--keep-tokens", "0"], "expected a whole number from 1"),
        (["--keep-ratio", "x"], "invalid float value"),
        (["--keep-ratio", "0.5", "--keep-tokens", "3"], "not allowed with"),
        (["--method", "atention", "--keep-ratio", "0.5"], "Did you mean 'attention'?"),
        (["--method", "norm"], "needs a budget"),
        (["--method", "none", "--keep-ratio", "0.5"], "needs another method"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "<image> <image>?"], "the prompt has 2 <image> but there is 1"),
        (["--image", PICTURE, "--prompt", "<image>?"], "but there are 2 pictures"),
        (["--image", "nowhere.png"], "'nowhere.png' does not exist"),
        (["--image", __file__], "is not a picture that Pillow can read"),
        (["--model", "./demo"], "./demo does not exist; expected a checkpoint"),
        (["--model", "nowhere"], "nowhere does not exist; expected a checkpoint"),
        (["--model", str(TINY.parent)], "has no config.json"),
        (["--max-tokens", "0"], "max_tokens 0 is out of range; expected one from 1"),
        (["--temp", "-1"], "out of range"),
        (["--overlay", "nowhere/kept.png"], "in an existing folder"),
        (["--overlay", str(TINY)], "no regular file"),
        (["--overlay", PICTURE], "is no PNG picture of this command"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--temp", "nan"], "out of range"),
        (["--image", "x" * 5000], "does not exist or is not a file"),
        (["--image", ""], "picture '' does not exist or is not a file"),
        (["--image", str(TINY.parent / "manifests")], "has no pictures"),
        (["--model", ""], "has no config.json"),
        (["--method", "NORM", "--keep-ratio", "0.5"], "Did you mean 'norm'?"),
        (["--prompt", "\udcff"], "not valid Unicode"),
        (["--positions", "middle"], "invalid choice"),
        (["--latency-target", "0"], "a TTFT of 0 ms cannot be kept"),
        (["--vision-budget", "nan"], "a TTFT of nan ms cannot be kept"),
        (["--latency-target", "9", "--image-size", "512"], "not allowed with"),
        (["--option", "coverage"], "--option is NAME=VALUE, not 'coverage'"),
        (
            ["--method", "trimvla", "--option", "coverage=x"],
            "option coverage of 'trimvla' is 'x'; expected a number",
        ),
        (["--option", "coverage=1", "--keep-ratio", "0.5"], "takes no options"),
        (["--option", "coverage=1", "--keep-ratio", "1"], "'norm' takes no options"),
        (["--method", "nowhere:f", "--keep-ratio", "0.5"], "cannot be imported"),
        (["--method", "json:f", "--keep-ratio", "0.5"], "cannot be imported"),
        (["--method", ".x:f", "--keep-ratio", "0.5"], "cannot be imported"),
        (
            ["--method", "./own.py:f", "--keep-ratio", "0.5"],
            "such as own:f, run in the",
        ),
        (
            ["--method", "norm:0.5"],
            "has a budget or a place; expected a name, or",
        ),
        (["--method", "fastv@2:0.5"], "--prune fastv@2:0.5"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main([*ASK, *options])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_picture_and_a_prompt_are_needed(capsys):
    for options, message in (
        (["--model", str(TINY), "--prompt", "Hi"], "no picture was given"),
        (["--model", str(TINY), "--image", PICTURE], "no prompt was given"),
    ):
        with pytest.raises(SystemExit):
            main(options)
        assert message in capsys.readouterr().err


def parsers() -> dict:
    """Return the parsers of all commands and subcommands by name."""
    found = {"mlx_tokprune": program.build_parser()}
    for name in program.commands():
        module = importlib.import_module(program.module_of(name))
        found[name] = module.build_parser()
    for action in found["train"]._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {f"train {name}": one for name, one in action.choices.items()}
    return found


# First words of a help string that only finishes a sentence begun elsewhere.
UNFINISHED = {"of", "that", "which", "what", "how", "such", "by", "so"}


@pytest.mark.parametrize("name", [*parsers()])
def test_help_is_short_grouped_and_ends_with_an_example(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = parsers()[name]
    lines = parser.format_help().rstrip().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    command = "mlx_tokprune" if name == "mlx_tokprune" else f"mlx_tokprune {name}"
    assert lines[0].startswith(f"usage: {command} ")
    usage = parser.format_usage()
    for action in parser._actions:
        named = [action.metavar, *action.option_strings, *(action.choices or ())]
        assert not action.required or any(one in usage for one in named if one)
    if name != "mlx_tokprune":
        assert "example:" in lines[-4:]
        assert lines[lines.index("example:") + 1].startswith("  mlx_tokprune ")
    for action in parser._actions:
        assert action.help, action.option_strings
        words = action.help.lower().split()
        hidden = action.help is argparse.SUPPRESS
        assert hidden or words[0].strip(",;:") not in UNFINISHED, action.help


@pytest.mark.parametrize("name", [*parsers()])
def test_examples_are_commands_that_parse(name):
    parser = parsers()[name]
    if name == "mlx_tokprune":
        return
    text = parser.epilog.partition("example:")[2].replace("\\\n", " ")
    _, *words = shlex.split(text)
    assert words[: len(name.split())] == name.split()
    parser.parse_args(words[len(name.split()) :])


@pytest.mark.parametrize("name", ["generate", "chat", "act"])
def test_usage_has_what_a_first_command_needs(name):
    """Images and prompts are not required by the parser: the demo has its own."""
    parser = parsers()[name]
    example = parser.epilog.partition("example:")[2]
    for flag in ("--model", "--image", "--prompt", "--instruction"):
        assert (flag in parser.format_usage()) == (flag in example), flag


@pytest.mark.parametrize("name", [*parsers()])
def test_the_version_is_everywhere(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parsers()[name].parse_args(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"mlx-tokprune {mlx_tokprune.__version__}\n"


def test_a_mistyped_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*ASK, "--keep-ration", "0.5"])
    assert stop.value.code == 2
    assert "Did you mean '--keep-ratio'?" in capsys.readouterr().err


def test_one_command_line_runs_every_command(capsys):
    program.main(["methods", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in rows} == set(list_pruners())
    (attention,) = (row for row in rows if row["method"] == "fastv")
    assert (attention["place"], attention["source"]) == ("layer 2", "arXiv 2403.06764")
    program.main(["methods"])
    table, _, legend = capsys.readouterr().out.partition("\n\n")
    needs = {need for row in rows for need in row["needs"].split(", ") if need}
    for word in (*table.splitlines()[0].split()[1:], *needs):
        assert re.search(rf"\b{word}\b", legend), word
    with pytest.raises(SystemExit):
        program.main(["generat"])
    assert "generat" in capsys.readouterr().err


def test_one_plan_is_written_alike_in_every_command():
    """A plan joined by `+` equals the plan of repeated `--prune` flags."""
    joined = ["--prune", "norm:0.5@tower+fastv:0.5@2"]
    apart = ["--prune", "norm:0.5@tower", "--prune", "fastv:0.5@2"]
    plans = [
        plan_of(parsers()[name].parse_args(flags), "norm")
        for name in ("generate", "act")
        for flags in (joined, apart)
    ]
    assert all(plan == read_plan(joined[1]) for plan in plans)
    for name in ("bench", "evaluate"):
        assert row_plans(parsers()[name].parse_args(joined)) == joined[1:]


@pytest.mark.parametrize("flag", ["--model=--", "--prompt=--"])
def test_two_dashes_are_no_value(capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        main([flag])
    assert stopped.value.code == 2
    assert "expected one value" in capsys.readouterr().err
