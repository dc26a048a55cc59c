"""A few cases of every group of `make faults`, and the detection of faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import case, whole
from faults.__main__ import SHARES, table
from faults.crew import Task

TESTS = Path(__file__).parent


def ended(**known) -> case.Ended:
    return case.Ended(**{"code": 0, "error": None, "trace": "", "out": "", **known})


def test_a_small_seed():
    """A few cases of each group pass in a separate process."""
    program = [sys.executable, "-m", "faults", "--cases", "12", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for group in SHARES:
        assert f"\n{group.rjust(11)}" in done.stdout, done.stdout


def test_every_kind_of_fault_is_counted(tmp_path, monkeypatch):
    """A fault of each kind is reported as that kind."""
    place = case.Place.make(tmp_path / "case", tmp_path)
    doings = {
        "traceback": lambda: {}["x"],
        "memory": lambda: bytearray(1 << 60),
        "badly": lambda: sys.exit(1),
        "hang": lambda: signal_late(),
        "half-written": lambda: Path(".e.json.partial-host-1-x").write_text("{"),
        "succeeded": lambda: print("{}"),
    }

    def signal_late():
        raise case.Hang

    for kind, doing in doings.items():
        monkeypatch.setattr(case, "module_of", lambda _, main=doing: Fake(main))
        assert case.perform("act", [], place).kind == kind


class Fake:
    """Stand-in of a command's module with the given `main`."""

    def __init__(self, main):
        self.main = lambda argv: main()


@pytest.mark.parametrize(
    ("err", "kind"),
    [
        ("error: no such file\n", "refused"),
        ("mlx_tokprune act: error: unknown flag (see --help)\n", "refused"),
        ("note: skipped a.txt\nerror: no picture\n", "refused"),
        ("error: a\nerror: b\n", "badly"),
        ("error: \x1b[2J\n", "badly"),
        (f"error: {'x' * 700}\n", "badly"),
        ("something else\n", "badly"),
        ("", "badly"),
        ("Traceback (most recent call last):\nKeyError\n", "traceback"),
    ],
)
def test_refusals_are_one_short_line(err, kind):
    assert case.judge(ended(code=2, err=err), []).kind == kind


def test_results_that_are_not_whole(tmp_path):
    for name, text in (("a", '{"schema": 1}'), ("b", '{"schema"'), ("c", "")):
        (tmp_path / name).write_text(text)
    found = whole.leftovers(tmp_path, whole.Listing({}))
    assert [line[:3] for line in sorted(found)] == ["'b'", "'c'"]


def test_the_table_counts_by_group():
    found = [(Task("flags", 0, 0), case.Outcome("hang"))] * 2
    assert [line.split()[:2] for line in table(found).splitlines()[1:]] == [
        ["flags", "2"],
        ["all", "2"],
    ]
