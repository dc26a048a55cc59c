"""The user pages: their commands and Python blocks run, in order, on stand-ins.

A page runs in an empty folder. A name that a step reads and no step before it has
written, such as `photo.jpg`, is made from `STAND_INS`; any other name is an error of
the command itself.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import COREMLTOOLS_WARNINGS, TINY, TINY_CHUNKS, TINY_POLICY
from PIL import Image
from test_docs import (
    ROOT,
    CommandLine,
    lines_of,
    mistake,
    module_of,
    shell_lines,
    text_of,
)

PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]

# Steps that cannot run in a test, by how they begin: why.
NOT_RUN = {
    "pip install": "changes the environment",
    "make demo": "sets up an environment",
    "make test": "runs the tests",
    "mlx_tokprune demo": "tests/test_demo.py runs it",
    "mlx_tokprune chat": "reads standard input; tests/test_chat.py runs it",
    "mlx_tokprune generate --image https": "fetches; tests/test_sources.py does",
    "lmms-eval --model": "lmms-eval is not among the tests' packages",
    "python -m mlx_vlm.server": "serves until it is stopped",
    "mlx_tokprune serve": "serves until it is stopped; tests/test_serve.py runs it",
    "curl": "asks a running server; tests/test_serve.py does",
    "python -m recipes.testbed": "downloads weights",
    "python -m recipes.testbed.questions": "needs the downloaded pictures",
    "python -m recipes.testbed.run": "needs the downloaded weights",
    "mlx_tokprune generate --vision": "Core ML runs on macOS only",
}

# Flags behind those of a documented command: smaller budgets.
SMALLER = {
    "generate": "--max-tokens 4",
    "bench": "--methods norm --keep-ratios 0.5 --runs 1 --tokens 2",
    "evaluate": "--max-tokens 2",
    "evaluate --model": "--methods norm --keep-ratios 0.5",
    "evaluate --data demo": "--methods norm --keep-ratios 0.5 --pictures 1",
    "evaluate --pictures": "--methods norm --keep-ratios 0.5 --pictures 1",
    "evaluate --runtime": "--methods norm --keep-ratios 0.5",
    "train prune": "--iters 1 --batch-size 2 --questions 1 --pictures 2",
    "train lora": "--iters 1 --batch-size 2 --questions 1",
    "examples/lmms_eval/make_questions.py": "2",
    "mlx_vlm.generate": "--max-tokens 4",
}

# Flags whose value a command writes.
OUTPUTS = ("--mlx-path", "--output", "--save-path", "--overlay", "--plots")


@dataclass(frozen=True)
class Step(CommandLine):
    """Command line of a page, or a Python block."""

    python: bool = False

    def reads(self) -> list[str]:
        """Return the names of files and models that the step may read."""
        if self.python:
            return re.findall(r"\"([^\"\n]+)\"", self.text)
        words = shlex.split(self.text)
        pairs = zip(["", *words], words, strict=False)
        return [word.rpartition("=")[2] for flag, word in pairs if flag not in OUTPUTS]

    def writes(self) -> list[str]:
        """Return the files and folders that a command names as its output."""
        words = [] if self.python else shlex.split(self.text)
        pairs = itertools.pairwise(words)
        return [word for flag, word in pairs if flag in OUTPUTS]


@functools.cache
def steps_of(page: str) -> list[Step]:
    """Return the command lines, in blocks and in prose, and the Python blocks."""
    text, steps = text_of(page), []
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        number = text[: block.start()].count("\n") + 1
        steps.append(Step(page, number, block[1], python=True))
    python = {
        number + line
        for number, lines in ((s.number, s.text.count("\n")) for s in steps)
        for line in range(lines + 2)
    }
    for number, line in shell_lines(page):
        if number not in python and not line.startswith("```"):
            steps.append(Step(page, number, line))
    prose = "\n".join("" if line.code else line.text for line in lines_of(text))
    for span in re.finditer(r"`(mlx_tokprune [a-z]+\s[^`]*--[^`]*)`", prose):
        number = prose[: span.start()].count("\n") + 1
        steps.append(Step(page, number, " ".join(span[1].split())))
    return sorted(steps, key=lambda step: step.number)


# Stand-ins --------------------------------------------------------------------------


def picture(path: Path) -> None:
    with Image.open(TINY / "image_1.png") as image:
        image.convert("RGB").save(path)


def photos(path: Path) -> None:
    path.mkdir()
    for number in range(2):
        shutil.copyfile(TINY / f"image_{number}.png", path / f"{number}.png")


def questions(path: Path) -> None:
    lines = []
    for number, word in enumerate(("red", "blue")):
        shutil.copyfile(TINY / f"image_{number}.png", path.parent / f"{number}.png")
        line = {"image": f"{number}.png", "question": "What is this?", "answer": word}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def fast_vlm(path: Path) -> None:
    shutil.copytree(TINY, path)


def openvla(path: Path) -> None:
    shutil.copytree(TINY_POLICY, path)
    config = path / "config.json"
    config.write_text(config.read_text().replace("toy_robot", "bridge_orig"))


def pi0_fast(path: Path) -> None:
    shutil.copytree(TINY_CHUNKS, path)


def qwen(path: Path) -> None:
    from vlm.families import FAMILIES

    FAMILIES["qwen2_5_vl"].write(path)


def own_method(path: Path) -> None:
    """Save the block that defines the method, as the page says."""
    (source,) = (
        step.text
        for page in PAGES
        for step in steps_of(page)
        if step.python and "def first(" in step.text
    )
    path.with_name("mine.py").write_text(source)


STAND_INS = {
    "photo.jpg": picture,
    "frame.png": picture,
    "front.png": picture,
    "hand.png": picture,
    "photos": photos,
    "questions.jsonl": questions,
    "q.jsonl": questions,
    "apple/FastVLM-0.5B": fast_vlm,
    "FastVLM-0.5B-mlx": fast_vlm,
    "FastVLM-7B-mlx": fast_vlm,
    "openvla/openvla-7b": openvla,
    "openvla-7b-mlx": openvla,
    "my-pi0fast": pi0_fast,
    "mlx-community/Qwen2.5-VL-3B-Instruct-4bit": qwen,
    "DIR_OR_ID": qwen,
    "mine:first": own_method,
}


# Running ----------------------------------------------------------------------------


def reason_not_to_run(step: Step) -> str:
    """Return why a step is not run, or an empty string."""
    for start, reason in NOT_RUN.items():
        if step.text.startswith(start):
            return reason
    if re.match(r"mlx_tokprune coreml ", step.text):
        if importlib.util.find_spec("coremltools") is None:
            return "needs coremltools"
        earlier = PAGES[: PAGES.index(step.page)]
        if any(other.text == step.text for p in earlier for other in steps_of(p)):
            return "runs on an earlier page, and takes seconds"
    return ""


def run_python(step: Step, names: dict, monkeypatch) -> None:
    """Run a block; answers are short."""
    for name in {"mlx_tokprune", "mlx_vlm"} & set(re.findall(r"\w+", step.text)):
        module = importlib.import_module(name)
        fewer = functools.partial(module.generate, max_tokens=4)
        monkeypatch.setattr(module, "generate", fewer)
    code = "\n" * step.number + step.text
    exec(compile(code, str(ROOT / step.page), "exec"), names)


def run_command(step: Step, monkeypatch) -> None:
    """Run a command in this process."""
    words = shlex.split(step.text)
    python, ours = words[0] == "python", words[0] == "mlx_tokprune"
    words = words[2:] if words[:2] == ["python", "-m"] else words[1:]
    assert python or ours, "neither run nor in NOT_RUN"
    line = " ".join(words)
    for start, flags in SMALLER.items():
        if f"{line} ".startswith(f"{start} "):
            words += shlex.split(flags)
    if ours:
        main = importlib.import_module(module_of(words[0])).main
        main(words[1:])
        return
    monkeypatch.setattr(sys, "argv", words)
    if words[0].endswith(".py"):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def error_of(step: Step, names: dict, monkeypatch, capsys) -> str:
    """Make what a step reads, run it, and return its error, or an empty string."""
    for name in step.reads():
        if name in STAND_INS and not Path(name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            STAND_INS[name](Path(name))
    try:
        if step.python:
            run_python(step, names, monkeypatch)
        else:
            run_command(step, monkeypatch)
        missing = [name for name in step.writes() if not Path(name).exists()]
        return f"did not write {', '.join(missing)}" if missing else ""
    except SystemExit as stop:
        return capsys.readouterr().err.strip() if stop.code else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def coreml_marks(page: str) -> list:
    commands = (step.text.startswith("mlx_tokprune coreml") for step in steps_of(page))
    return COREMLTOOLS_WARNINGS if any(commands) else []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, and forget the method written to it."""
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("folder", "not_compiled")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=coreml_marks(page)) for page in PAGES]
)
def test_a_page_runs(page, monkeypatch, capsys):
    names, errors = {}, []
    for step in steps_of(page):
        if reason_not_to_run(step):
            if step.text.startswith(("mlx_tokprune", "python -m recipes")):
                errors.append(mistake(step, capsys))
        elif error := error_of(step, names, monkeypatch, capsys):
            errors.append(f"{step}\n  {error}")
    assert not any(errors), "\n".join(filter(None, errors))


def test_lists_are_not_stale():
    steps = [step for page in PAGES for step in steps_of(page)]
    texts = [step.text for step in steps]
    assert sum(not reason_not_to_run(step) for step in steps) > 40
    for start in NOT_RUN:
        assert any(text.startswith(start) for text in texts), start
    for start in SMALLER:
        command = re.compile(
            rf"(mlx_tokprune|python|python -m) {re.escape(start)}( |$)"
        )
        assert any(command.match(text) for text in texts), start
    names = {name for step in steps for name in step.reads()}
    assert STAND_INS.keys() <= names


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mlx_tokprune methods --jsno", "unrecognized arguments: --jsno"),
        ("mlx_tokprune generate --model NONE --image photo.jpg --prompt a", "NONE"),
        ("mlx_tokprune methods --json --overlay kept.png", "--overlay"),
        ("mlx_tokprune tune --model demo", "No module named 'mlx_tokprune.tune'"),
        ("python -m mlx_vlm.nothing", "No module named mlx_vlm.nothing"),
        ("mlx_lm.generate --prompt a", "neither run nor in NOT_RUN"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_wrong_command_is_an_error(text, error, monkeypatch, capsys):
    assert error in error_of(Step("page", 1, text), {}, monkeypatch, capsys)


@pytest.mark.usefixtures("folder")
def test_a_wrong_block_is_an_error(monkeypatch, capsys):
    step = Step("page", 1, "from mlx_tokprune import " + "Prunner", python=True)
    assert "cannot import name 'Prunner'" in error_of(step, {}, monkeypatch, capsys)
