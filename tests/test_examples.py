"""The examples run as scripts from another folder."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

import mlx_tokprune
from mlx_tokprune.checkpoints.embedded import PICTURES, POLICY_FRAME
from mlx_tokprune.pruners.registry import GROUP

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
OWN = EXAMPLES / "own_method"
# The 4 x 4 middle of the demo's 8 x 8 tokens.
MIDDLE = [8 * row + column for row in range(2, 6) for column in range(2, 6)]


def run(*command, cwd: Path, path: tuple = ()) -> subprocess.CompletedProcess:
    """Run Python with these arguments, with `path` first in `PYTHONPATH`."""
    # On a busy machine, threads of OpenBLAS wait for each other for long.
    env = os.environ | {"MPLBACKEND": "Agg", "OPENBLAS_NUM_THREADS": "1"}
    before = [env["PYTHONPATH"]] if "PYTHONPATH" in env else []
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), *before])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_script_is_run_here():
    scripts = {"quick_start.py", "sweep.py", "robot_loop.py", "kept.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == scripts


def test_quick_start(tmp_path):
    picture = PICTURES[0]
    asked = ("--image", picture.path, "--prompt", picture.question)
    out = run(EXAMPLES / "quick_start.py", *asked, cwd=tmp_path).stdout
    found = re.findall(r"^  (\w.*?) +kept (.+?) +TTFT +([\d.]+) ms   (.*)$", out, re.M)
    names, kept, times, answers = zip(*found, strict=True)
    assert names[:3] == ("every token", "norm", "FastV")
    assert kept == ("64", "32", "32 from layer 2 on", "32")
    assert answers == (*[picture.answer] * 3, "3")  # a circle, a square, a triangle
    assert all(float(ms) > 0 for ms in times)
    known = re.fullmatch(r"norm, (\d+) tokens known", names[3])
    assert int(known[1]) > 32  # the picture's tokens and the words before them


def test_sweep_prints_and_draws(tmp_path):
    rows = ("--methods", "norm", "uniform", "--ratios", "0.5", "0.11", "--runs", "2")
    how = (*rows, "--output", "drawn.png")
    out = run(EXAMPLES / "sweep.py", *how, cwd=tmp_path).stdout
    lines = [line.split() for line in out.splitlines()[2:-1]]
    assert [line[:3] for line in lines] == [
        ["none", "1", "64"],
        ["norm", "0.5", "32"],
        ["norm", "0.11", "7"],
        ["uniform", "0.5", "32"],
        ["uniform", "0.11", "6"],
    ]
    assert [line[3] for line in lines[:4]] == ["yes", "yes", "yes", "no"]
    for line in lines:
        least, most = map(float, line[6].split("-"))
        assert line[4] == "2"
        assert 0 < least <= float(line[5]) <= most
    with Image.open(tmp_path / "drawn.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each method


def test_what_is_kept_is_drawn(tmp_path):
    """Images with dropped tokens are darker than the whole image."""
    asked = ("--methods", "norm", "uniform", "--keep-ratio", "0.25")
    out = run(EXAMPLES / "kept.py", *asked, cwd=tmp_path).stdout
    lines = re.findall(r"^(\w+): (\d+) of 64 tokens; (.+)$", out, re.M)
    assert [line[:2] for line in lines] == [("norm", "16"), ("uniform", "16")]
    assert lines[0][2] == PICTURES[0].answer
    sheet = Image.open(tmp_path / "kept.png").convert("L")
    width = (sheet.width - 20) // 3
    panels = [
        sheet.crop((n * (width + 10), 22, n * (width + 10) + width, sheet.height))
        for n in range(3)
    ]
    whole, norm, uniform = (np.asarray(panel).mean() for panel in panels)
    assert norm < 0.7 * whole
    assert uniform < 0.7 * whole


def test_robot_loop(tmp_path):
    """On a constant frame, each draft except the first after a reset is right."""
    how = ("--steps", "3", "--episodes", "2", "--turn", "0")
    out = run(EXAMPLES / "robot_loop.py", *how, cwd=tmp_path).stdout
    steps = re.findall(r"^step \d: (.*?)   (\d) calls$", out, re.M)
    assert [calls for _, calls in steps] == ["4", "1", "1"]
    values = [float(value) for value in steps[0][0].split()]
    expert = [float(value) for value in POLICY_FRAME.answer.split()]
    assert values == pytest.approx(expert, abs=0.15)
    assert "actions with drafts are the same\n" in out
    found = re.findall(r"^(\w+) drafts +([\d.]+) calls per action, ([\d.]+)", out, re.M)
    assert [row[:2] for row in found] == [("without", "4.00"), ("with", "2.00")]
    assert all(float(rate) > 0 for _, _, rate in found)


# Somebody's own method --------------------------------------------------------------


def kept_by(method: str, *options: str, cwd: Path, path: tuple) -> tuple:
    """Return the record of `generate`, and its stderr."""
    budget = ("--method", method, "--keep-ratio", "0.25", "--json", *options)
    done = run("-m", "mlx_tokprune.generate", *budget, cwd=cwd, path=path)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_an_own_method_by_its_path(tmp_path):
    asked = ("center_pruner:center", "--option", "spread=4")
    record, _ = kept_by(*asked, cwd=tmp_path, path=(OWN,))
    assert record["method"] == "center"
    assert record["kept_indices"] == [list(range(24, 40))]  # the two rows in the middle


def test_installed_methods_by_their_name_and_broken_ones(tmp_path):
    """Methods of entry points are found; those of a missing module are reported."""
    section = r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"'
    group, name, value = re.search(
        section, (OWN / "pyproject.toml").read_text()
    ).groups()
    assert group == GROUP
    for package, entry in (("own", f"{name} = {value}"), ("gone", "x = gone_away:x")):
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    record, said = kept_by(name, cwd=elsewhere, path=(tmp_path, OWN))
    assert record["method"] == "center"
    assert record["kept_indices"] == [MIDDLE]
    assert "methods of gone_away:x are left out: No module named 'gone_away'" in said
    assert f"methods of {value}" not in said


# What stands beside them ------------------------------------------------------------


def test_what_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    version = re.search(r"^version: (\S+)$", text, re.M)[1]
    assert version == mlx_tokprune.__version__


def test_the_least_python_is_one_and_every_dependency_has_it():
    """Each page, tool and example names the Python that the package requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    least = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["pyright"]["pythonVersion"] == least
    for name in ("README.md", "CONTRIBUTING.md", "docs/index.md"):
        assert f"Python {least} or newer" in (ROOT / name).read_text(), name
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert f'python: ["{least}"' in workflow
    example = tomllib.loads((OWN / "pyproject.toml").read_text())
    assert example["project"]["requires-python"] == f">={least}"
    for line in project["project"]["dependencies"]:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate():
            pythons = metadata.metadata(needed.name)["Requires-Python"]
            assert f"{least}.0" in SpecifierSet(pythons or ""), needed.name
