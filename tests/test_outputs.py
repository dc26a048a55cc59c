"""Every output flag replaces an earlier result of its command, and nothing else."""

import contextlib
import importlib
import json
import re
import resource
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import TINY, TINY_POLICY
from PIL import Image

from mlx_tokprune.errors import InputError, note
from mlx_tokprune.evaluate.journal import Journal
from mlx_tokprune.files import (
    PAGE,
    PICTURE,
    is_replaced,
    locked,
    write_arrays,
    write_picture,
    write_text,
)
from mlx_tokprune.measure.accuracy import SCHEMA
from mlx_tokprune.report.page import page
from mlx_tokprune.train.loop import Loop, Schedule

PHOTO = TINY / "image_0.png"
TEXT = "An answer of three words"  # no command writes such a file


def main_of(command):
    return importlib.import_module(f"mlx_tokprune.{command}.__main__").main


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a working folder with questions, a photograph and a text of the user."""
    monkeypatch.chdir(tmp_path)
    note.cache_clear()
    shutil.copy(PHOTO, "photo.png")
    line = {"image": "photo.png", "question": "What?", "answer": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "mine.txt").write_text(TEXT)
    (tmp_path / "mine.json").write_text('{"schema": "other", "a": 1}')
    (tmp_path / "link.png").symlink_to("photo.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text(TEXT)
    return tmp_path


MODEL = ["--model", str(TINY)]
EVALUATE = [*MODEL, "--data", "q.jsonl", "--methods", "norm", "--keep-ratios", ".5"]
BENCH = [*MODEL, "--image", "photo.png", "--methods", "norm", "--keep-ratios", ".5"]
ASK = [*MODEL, "--image", "photo.png", "--prompt", "What?", "--max-tokens", "1"]
ACT = ["--model", str(TINY_POLICY), "--image", "photo.png", "--instruction", "lift"]
TRAIN = [*MODEL, "--data", "q.jsonl", "--steps", "1", "--batch", "1"]
FLAGS = [
    ("evaluate", EVALUATE, "--output"),
    ("evaluate", EVALUATE, "--plot"),
    ("bench", BENCH, "--output"),
    ("bench", [*BENCH, "--runtime", "mlx-vlm"], "--output"),
    ("bench", BENCH, "--plots"),
    ("generate", ASK, "--overlay"),
    ("act", ACT, "--overlay"),
    ("report", ["r.json"], "--output"),
    ("demo", [], "--output"),
    ("convert", ["--hf-path", str(TINY)], "--mlx-path"),
    ("coreml", [*MODEL, "--keep-ratio", ".5"], "--output"),
    ("attach", [*MODEL, "--keep-ratio", ".5"], "--mlx-path"),
    ("train", ["prune", *TRAIN], "--output"),
    ("train", ["lora", *TRAIN], "--output"),
    ("train", ["fuse", *MODEL, "--adapter-path", "folder"], "--output"),
    ("train", ["prune", *TRAIN, "--output", "scorer"], "--folder"),
]


def contents(folder) -> dict:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("target", ["photo.png", "mine.txt", "mine.json", "link.png"])
@pytest.mark.parametrize(("command", "argv", "flag"), FLAGS)
def test_no_file_of_the_user_is_replaced(home, capsys, command, argv, flag, target):
    if command == "report":
        pytest.importorskip("matplotlib")
    before = contents(home)
    with pytest.raises(SystemExit) as ended:
        main_of(command)([*argv, f"{flag}={target}"])
    assert ended.value.code == 2
    assert contents(home) == before
    assert (home / "link.png").is_symlink()


def test_pictures_of_a_folder_are_the_user_s(home, capsys):
    for name in ("ttft_by_tokens.png", "overlay_1.png"):
        shutil.copy(PHOTO, home / "folder" / name)
    before = contents(home)
    for command, argv, flag in (("bench", BENCH, "--plots"), ("demo", [], "--output")):
        with pytest.raises(SystemExit):
            main_of(command)([*argv, flag, "folder"])
        assert "is no PNG picture of this command" in capsys.readouterr().err
        assert contents(home) == before


def test_a_training_does_not_begin_in_a_folder_of_the_user(home, capsys):
    for name in ("state-1.safetensors", "settings.json"):
        (home / "folder" / name).write_text('{"editor": "vim"}')
        before = contents(home / "folder")
        with pytest.raises(SystemExit):
            main_of("train")(["prune", *TRAIN, "--output", "s", "--folder", "folder"])
        assert capsys.readouterr().err.startswith("error: folder")
        assert contents(home / "folder") == before


@pytest.mark.parametrize("name", ["e.json.0-of-1.jsonl", "e.json.0-of-1.jsonl.lock"])
def test_a_file_with_the_name_of_a_journal_is_kept(home, capsys, name):
    (home / name).write_text(TEXT)
    before = contents(home)
    with pytest.raises(SystemExit):
        main_of("evaluate")([*EVALUATE, "--output", "e.json"])
    assert f"{name} exists and is no" in capsys.readouterr().err
    assert contents(home) == before


def test_other_names_beside_the_journals_are_kept(home):
    other = home / "e.json.old-of-1.jsonl"
    other.write_text(TEXT)
    main_of("evaluate")([*EVALUATE, "--output", "e.json"])
    assert other.read_text() == TEXT


def test_a_result_is_replaced_by_its_command_only(home, capsys, caplog):
    main_of("evaluate")([*EVALUATE, "--output", "e.json"])
    assert not caplog.messages
    first = (home / "e.json").stat().st_ino
    main_of("evaluate")([*EVALUATE, "--output", "e.json"])
    assert (home / "e.json").stat().st_ino != first
    [text] = caplog.messages
    assert text == "note: e.json is there, from an earlier run, and will be replaced"
    before = contents(home)
    with pytest.raises(SystemExit):
        main_of("bench")([*BENCH, "--output", "e.json"])
    assert "is no result (mlx_tokprune.bench" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main_of("report")(["e.json", "--output", "e.json"])
    assert contents(home) == before


def test_an_overlay_is_replaced(home, caplog):
    for number in range(2):
        main_of("generate")([*ASK, "--keep-ratio", ".5", "--overlay", "kept.png"])
        assert len(caplog.messages) == number


def test_an_overlay_that_is_read_is_kept(home, capsys):
    main_of("generate")([*ASK, "--keep-ratio", ".5", "--overlay", "folder/kept.png"])
    before = contents(home)
    for image in ("folder/kept.png", "folder"):
        argv = [*ASK, "--image", image, "--overlay", "folder/kept.png"]
        with pytest.raises(SystemExit):
            main_of("generate")(argv)
        assert "would overwrite" in capsys.readouterr().err
    assert contents(home) == before


@pytest.mark.parametrize("target", ["", "/", "."])
def test_a_target_needs_a_name(home, target):
    with pytest.raises(InputError, match=f"'{re.escape(target)}' names no file"):
        is_replaced(target, PICTURE)


def test_what_is_ours(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    write_picture(tmp_path / "figure", figure)
    write_picture(tmp_path / "picture", Image.new("RGB", (4, 4)))
    write_text(tmp_path / "page", page("Title", []), PAGE)
    result = {"schema": SCHEMA, "rows": []}
    (tmp_path / "result").write_text(json.dumps(result, indent=1))
    (tmp_path / "empty").touch()
    kinds = {"figure": PICTURE, "picture": PICTURE, "page": PAGE, "result": SCHEMA}
    for name, own in kinds.items():
        for kind in (PICTURE, PAGE, SCHEMA):
            assert is_replaced(tmp_path / "empty", kind)
            if kind == own:
                assert is_replaced(tmp_path / name, kind)
                continue
            with pytest.raises(InputError, match="choose another name"):
                is_replaced(tmp_path / name, kind)


def test_a_file_that_came_meanwhile_is_kept(tmp_path):
    file = tmp_path / "e.json"
    assert not is_replaced(file, SCHEMA)
    file.write_text(TEXT)
    with pytest.raises(InputError, match="is no result"):
        write_text(file, "{}", SCHEMA)
    assert [path.read_text() for path in tmp_path.iterdir()] == [TEXT]


def test_answers_of_another_run_are_replaced_with_a_note(tmp_path, caplog):
    note.cache_clear()
    header = {"schema": SCHEMA, "weights": 1, "rows": []}
    Journal(tmp_path / "j", header).add(0, {})
    assert set(Journal(tmp_path / "j", header).records) == {0}
    assert not caplog.messages
    Journal(tmp_path / "j", {**header, "weights": 2})
    assert "has answers of another run" in caplog.text


def test_a_lock_is_held_once(tmp_path):
    with locked(tmp_path / "x"), pytest.raises(InputError, match="another run"):
        with locked(tmp_path / "x"):
            pass
    assert not any(tmp_path.iterdir())


# A full disk ------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int):
    """Limit the size of written files: the error is that of a full disk but in name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_loop(folder) -> Loop:
    mx.random.seed(0)
    module = nn.Linear(16, 16)
    return Loop(module, lambda *_: (mx.zeros(()), 1), Schedule(4), folder)


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path):
    loop = make_loop(tmp_path)
    loop._save(1)
    before = contents(tmp_path)
    assert {path.name for path in before} == {"state.json", "state-1.safetensors"}
    for size in (0, 60, 1500):
        with largest_file(size), pytest.raises(OSError, match=r"state-2"):
            loop._save(2)
        assert contents(tmp_path) == before
    assert make_loop(tmp_path).begin == 1


@pytest.mark.parametrize("kind", ["prune", "lora"])
def test_a_full_disk_in_training_is_one_sentence(home, capsys, kind):
    main = main_of("train")
    with largest_file(1000), pytest.raises(SystemExit) as ended:
        main([kind, *TRAIN, "--output", "out"])
    assert ended.value.code == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: File too large (out.training/state-1.safetensors")
    assert not (home / "out").exists()
    main([kind, *TRAIN, "--output", "out"])
    assert (home / "out").exists()


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_checkpoint_that_cannot_be_written_is_not_there(home, capsys, size):
    before = contents(home)
    with largest_file(size), pytest.raises(SystemExit) as ended:
        main_of("convert")(["--hf-path", str(TINY), "--mlx-path", "made"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: File too large")
    assert contents(home) == before


@pytest.mark.parametrize("damage", ["no arrays", "no step", "other arrays", "text"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    make_loop(tmp_path)._save(1)
    state = tmp_path / "state.json"
    if damage == "no arrays":
        (tmp_path / "state-1.safetensors").unlink()
    elif damage == "no step":
        fields = json.loads(state.read_text())
        state.write_text(json.dumps({"schedule": fields["schedule"]}))
    elif damage == "other arrays":
        write_arrays(tmp_path / "state-1.safetensors", {"x/y": mx.zeros(3)})
    else:
        state.write_text("{")
    with pytest.raises(InputError, match=r"damaged|cannot be read as JSON"):
        make_loop(tmp_path)
