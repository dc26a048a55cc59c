"""Recorded answers are kept, and shared by processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_tokprune import load
from mlx_tokprune.checkpoints.fingerprint import fingerprint
from mlx_tokprune.evaluate import items as data
from mlx_tokprune.evaluate.gather import Workers
from mlx_tokprune.evaluate.journal import Journal, answer_all


class Counter:
    """Evaluator that answers with its number of calls."""

    def __init__(self):
        self.calls = 0

    def ask(self, item):
        self.calls += 1
        figures = {"divergence": 0.0, "kept": 4, "flops": 1.0, "accuracy": None}
        said = f"{item.question} {self.calls}"
        return {"none": {"answer": said, "agrees": True, **figures}}


def test_what_was_answered_is_kept(tmp_path):
    items = [data.Item("p", f"q{i}") for i in range(4)]
    rows = [{"label": "none"}]
    # JSON has no tuples, as the places of some methods are.
    file, header = tmp_path / "journal", {"a": (0.25, 0.5), "rows": rows}
    first = Counter()
    answer_all(first, items, [0, 1], Journal(file, header))
    with file.open("a") as stream:
        stream.write('{"item": 3, "rows": {"none": {"answer": 3}}}\n')  # damaged
        stream.write('{"item": 2, "ro')  # killed while it wrote
    again = Counter()
    records = answer_all(again, items, range(4), Journal(file, header))
    assert again.calls == 2
    assert records[0]["none"]["answer"] == "q0 1"
    assert records[3]["none"]["answer"] == "q3 2"
    assert set(Journal(file, header).records) == {0, 1, 2, 3}
    # Other weights, rows or questions: everything again.
    assert not Journal(file, {"a": 2, "rows": rows}).records


def test_weights_decide_what_is_the_same(demo):
    """The fingerprint tells scaled, negated and reversed weights apart."""
    model, _ = demo
    before = fingerprint(model)
    assert before == fingerprint(load("demo")[0])
    norm = model.language_model.model.norm
    weight = norm.weight
    try:
        for changed in (weight * 1.001, -weight, weight[::-1]):
            norm.weight = changed
            assert fingerprint(model) != before
    finally:
        norm.weight = weight
    assert fingerprint(model) == before


def test_workers_share_everything_once(monkeypatch):
    alone = Workers()
    assert alone.share(5) == [0, 1, 2, 3, 4]
    assert alone.gather({1: {"a": 2}}) == {1: {"a": 2}}


def test_two_processes_give_what_one_gives(tmp_path):
    """Two workers give the result of one, and a lost worker is reported."""
    options = ["--pictures", "2", "--methods", "norm", "--keep-ratios", "0.25"]
    program = [sys.executable, "-m", "mlx_tokprune.evaluate", *options]
    results = []
    for workers in ("1", "2"):
        output = tmp_path / f"{workers}.json"
        asked = [*program, "--workers", workers, "--output", str(output)]
        # Sums are rounded otherwise by other numbers of threads.
        one = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=300, env=one
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(output.read_text()))
    one, two = results
    assert one["rows"] == two["rows"]
    assert one["answers"] == two["answers"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "2.json"]
    # A worker that cannot write its journal is as good as dead.
    lost = tmp_path / "lost.json"
    (tmp_path / "lost.json.1-of-2.jsonl").mkdir()
    asked = [*program, "--workers", "2", "--output", str(lost)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "or was lost, so" in done.stderr
    assert not lost.exists()


def children(process: int) -> set[int]:
    """Return the processes that `process` started and that run."""
    listed = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    )
    rows = (line.split() for line in listed.stdout.splitlines())
    return {
        int(p) for p, parent, stat in rows if parent == f"{process}" and stat[0] != "Z"
    }


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.05)


def end_by(run: subprocess.Popen, number: int) -> str:
    """End a command with two workers by a signal, and return its stderr."""
    workers = set()
    try:
        until(lambda: len(children(run.pid)) == 2)
        workers = children(run.pid)
        until(lambda: len(list(Path(run.args[-1]).glob("up*"))) == 2)
        run.send_signal(number)
        run.wait(30)
        until(lambda: not any(map(is_running, workers)), 20)
    finally:
        for process in (run.pid, *workers):
            if is_running(process):
                os.kill(process, signal.SIGKILL)
    return run.communicate()[1]


# Workers that only wait; the second kind is deaf, as in a call of MLX.
WAIT = """
import pathlib, signal, sys, time
from mlx_tokprune.evaluate import gather
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
gather._PATIENCE = 1
gather.end_with_launcher()
pathlib.Path(sys.argv[1], f"up{{time.time_ns()}}").touch()
time.sleep(600)
"""
# A shell in the background starts its commands with SIGINT ignored.
LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mlx_tokprune.cli import command
from mlx_tokprune.evaluate import gather
gather._PATIENCE = 1
gather._PROGRAM = (sys.executable, "-c", sys.argv[1], sys.argv[2])
command(lambda argv: gather.launch([], 2, "nothing"))([])
"""


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command(tmp_path, number, deaf):
    """A signal to the command alone ends its workers."""
    program = [sys.executable, "-c", LAUNCH, WAIT.format(deaf=deaf), str(tmp_path)]
    run = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in end_by(run, number)
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    assert run.returncode == codes.get(number, -number)


def test_a_line_whose_rows_do_not_know_the_same_is_asked_again(tmp_path):
    figures = {"answer": "a", "agrees": True, "divergence": 0.0, "kept": 4}
    figures |= {"flops": 1.0, "accuracy": 1.0, "needed": 0.5}
    header = {"rows": [{"label": "none"}, {"label": "norm"}]}
    for name in ("accuracy", "needed"):
        rows = {"none": figures, "norm": {**figures, name: None}}
        file = tmp_path / name
        for lines in (rows, {**rows, "norm": figures}):
            texts = [header, {"item": 0, "rows": lines}]
            file.write_text("\n".join(map(json.dumps, texts)))
            known = Journal(file, header).records
            assert len(known) == (lines["norm"] is figures)


@pytest.mark.parametrize("share", [-0.1, 1.5, 100, {}, "x", True])
def test_a_share_above_one_is_asked_again(tmp_path, share):
    figures = {"answer": "a", "agrees": True, "divergence": 0.0, "kept": 4}
    figures |= {"flops": 1.0, "accuracy": 1.0, "needed": share}
    header = {"rows": [{"label": "none"}]}
    texts = [header, {"item": 0, "rows": {"none": figures}}]
    (tmp_path / "j").write_text("\n".join(map(json.dumps, texts)))
    assert not Journal(tmp_path / "j", header).records
