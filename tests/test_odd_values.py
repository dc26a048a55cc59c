"""Values that users pass and tests forget: numbers of NumPy, `~`, names in use."""

import dataclasses
import platform
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, TINY_POLICY

from mlx_tokprune import InputError, Pruner, generate, load, stream_generate
from mlx_tokprune.checkpoints.hub import EMBEDDED, resolve
from mlx_tokprune.cli import Parser
from mlx_tokprune.convert import convert
from mlx_tokprune.coreml.export import load_coremltools
from mlx_tokprune.errors import note
from mlx_tokprune.evaluate.items import read_questions
from mlx_tokprune.generate.settings import Settings
from mlx_tokprune.measure.results import read_any

PICTURE = str(TINY / "image_0.png")


# Python API -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": np.int64(5)},
        {"max_tokens": np.array(5), "seed": np.uint32(7)},
        {"kv_bits": np.int32(8), "kv_group_size": np.int64(32)},
        {"temp": np.float32(0.5), "top_p": np.float16(0.5)},
        {"temp": 1, "top_p": Fraction(1, 2)},
        {"temp": mx.array(0.5)},
    ],
)
def test_numbers_of_any_library(values):
    settings = Settings(**values)
    for name, value in values.items():
        kind = float if name in ("temp", "top_p") else int
        assert type(getattr(settings, name)) is kind
        assert getattr(settings, name) == pytest.approx(float(value), abs=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 5.0}, "max_tokens is a whole number, not 5.0"),
        ({"max_tokens": "5"}, "whole number, not '5'"),
        ({"max_tokens": None}, "whole number, not None"),
        ({"max_tokens": np.int64(0)}, "max_tokens 0 is out of range"),
        ({"temp": None}, "temp is a number, not None"),
        ({"temp": "hot"}, "temp is a number, not 'hot'"),
        ({"temp": np.float32("nan")}, "out of range"),
        ({"top_p": [0.5]}, "top_p is a number"),
        ({"kv_bits": "8"}, "kv_bits is a whole number"),
        ({"prefill_step_size": 1e3}, "prefill_step_size is a whole number"),
    ],
)
def test_other_values_are_one_sentence(values, message):
    with pytest.raises(InputError, match=message):
        Settings(**values)


def test_answers_with_numbers_of_numpy(tiny):
    plain = generate(*tiny, [PICTURE], "What?", max_tokens=3)
    assert generate(*tiny, [PICTURE], "What?", max_tokens=np.int64(3)) == plain
    options = {"max_tokens": np.int8(3), "temp": np.float32(0.5), "seed": np.int64(1)}
    assert generate(*tiny, [PICTURE], "What?", **options)


def test_pictures_come_in_any_iterable(tiny):
    plain = generate(*tiny, [PICTURE], "What?", max_tokens=2)
    for images in (PICTURE, (PICTURE,), iter([PICTURE]), (p for p in [PICTURE])):
        assert generate(*tiny, images, "What?", max_tokens=2) == plain
    for images in (None, [], 5, {"camera": PICTURE}, [None]):
        with pytest.raises(InputError, match="picture"):
            generate(*tiny, images, "What?")


def test_pruners_with_numbers_of_numpy(tiny):
    given = Pruner("attention", np.float32(0.5), at=np.int64(1), seed=np.uint8(3))
    assert given == Pruner("attention", 0.5, at=1, seed=3)
    assert [type(v) for v in (given.keep_ratio, given.at, given.seed)] == [
        *(float, int, int)
    ]
    assert Pruner("norm", keep_tokens=np.int64(4)).described()["keep_tokens"] == 4
    for pruner in (5, "norm", [None]):
        with pytest.raises(InputError, match="a pruner is a `Pruner`"):
            generate(*tiny, [PICTURE], "What?", pruner=pruner)


@pytest.mark.parametrize("name", [5, None, b"demo", ["demo"]])
def test_a_model_has_a_name(name):
    for use in (load, lambda name: convert(name, "out")):
        with pytest.raises(InputError, match="a model is a name or a folder"):
            use(name)


def test_types_of_weights():
    model, _ = load(TINY, dtype="float16")
    assert model.language_model.model.norm.weight.dtype == mx.float16
    for dtype in ("half", mx.int32, np.float16, 16):
        with pytest.raises(InputError, match="expected float32 or float16 or bfloat16"):
            load(TINY, dtype=dtype)
    with pytest.raises(InputError, match="a file or folder has a name, not 5"):
        load(TINY, adapter_path=5)
    with pytest.raises(InputError, match="a file or folder has a name, not None"):
        convert(str(TINY), None)


# Names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("wrist=~/x.png", "wrist=HOME/x.png"),
        ("./~/x", "./~/x"),
        ("x~/y", "x~/y"),
        ("a b=~/x", "a b=~/x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
    ],
)
def test_the_home_folder_in_flags(monkeypatch, tmp_path, value, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    for flag in ("--output", "--prompt"):
        parser.add_argument(flag)
    parser.add_argument("--image", action="append")
    parser.add_argument("results", nargs="*")
    for start in ([f"--output={value}"], ["--output", value]):
        args = parser.parse_args([*start, "--image", value, "--prompt", value])
        path = path.replace("HOME", str(tmp_path))
        assert (args.output, args.image, args.prompt) == (path, [path], value)
    assert parser.parse_args(["--", value]).results == [path]


def test_conversion_into_the_home_folder(monkeypatch, tmp_path, capsys):
    from mlx_tokprune.convert.__main__ import main

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    main(["--hf-path", str(TINY), "--mlx-path=~/out"])
    assert (tmp_path / "home" / "out" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_embedded_names_come_first_and_say_so(monkeypatch, tmp_path, caplog):
    note.cache_clear()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "demo")
    assert resolve("./demo") == Path("demo") == resolve(Path("demo"))
    assert not caplog.messages
    assert resolve("demo") == EMBEDDED["demo"]
    assert "demo is the embedded one; write ./demo" in caplog.text
    assert resolve("demo-policy") == EMBEDDED["demo-policy"]
    assert len(caplog.messages) == 1
    note.cache_clear()
    read_questions("demo", 1, None)
    assert len(caplog.messages) == 2


def test_commands_that_are_printed_are_quoted(monkeypatch, capsys):
    from mlx_tokprune.attach import __main__ as command

    monkeypatch.setattr(command, "write_folder", lambda *_: Path("pr une'd"))
    command.main(["--model", "m", "--keep-ratio", ".5", "--mlx-path", "x"])
    out = capsys.readouterr().out
    assert out.endswith("""python -m mlx_vlm.generate --model 'pr une'"'"'d'\n""")


def test_a_result_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.json").write_text('{"schema": "x"}', encoding="utf-8-sig")
    assert read_any(tmp_path / "r.json") == {"schema": "x"}


# Answers and machines ---------------------------------------------------------------


@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_an_answer_past_the_context_has_a_note(tiny, caplog, positions):
    model, processor = tiny
    note.cache_clear()
    text, pruner = "x " * 40, Pruner("norm", keep_tokens=1)
    options = {"pruner": pruner, "positions": positions, "max_tokens": 3}
    visual = next(stream_generate(*tiny, [PICTURE], text, **options)).visual
    length = sum(map(len, processor.prompt(text, 1).segments))
    length += visual.total if positions == "original" else 1
    for room, notes in ((3, 0), (2, 1), (-1, 2)):
        limited = dataclasses.replace(processor, context=length + room)
        pieces = list(stream_generate(model, limited, [PICTURE], text, **options))
        assert len(pieces) == 3
        assert len(caplog.messages) == notes
    assert "the answer passes the model's context of" in caplog.text


@pytest.mark.parametrize(
    ("version", "system", "machine", "message"),
    [
        ((3, 14, 0), "darwin", "arm64", "no wheel for Python"),
        ((3, 12, 1), "linux", "aarch64", "no wheel for Python .* aarch64; expected"),
        ((3, 12, 1), "linux", "x86_64", r"pip install 'mlx-tokprune\[coreml\]'"),
        ((3, 13, 1), "darwin", "arm64", r"pip install 'mlx-tokprune\[coreml\]'"),
    ],
)
def test_machines_without_coremltools(monkeypatch, version, system, machine, message):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(InputError, match=message):
        load_coremltools()


def test_a_policy_s_pictures_come_as_a_list(tiny_policy):
    from mlx_tokprune import predict_action

    for images in (None, 5, (TINY_POLICY for _ in "x")):
        with pytest.raises(InputError, match="pictures come as a list"):
            predict_action(*tiny_policy, images, "lift it")
