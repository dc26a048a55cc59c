"""The readers of files give a value or one `InputError` on files by hypothesis.

More examples: `FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz.py`.
"""

import contextlib
import json
import os
import struct

import pytest
from conftest import TINY, TINY_POLICY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_tokprune import InputError
from mlx_tokprune.bench.benchmark import read_bench
from mlx_tokprune.checkpoints.shards import read_header
from mlx_tokprune.evaluate.items import read_questions
from mlx_tokprune.evaluate.journal import Journal
from mlx_tokprune.files import read_json
from mlx_tokprune.measure.accuracy import read_result
from mlx_tokprune.models import fastvlm, openvla
from mlx_tokprune.processing.actions import choose_statistics, read_bounds
from mlx_tokprune.processing.image import load_image

quick = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
CONFIG = json.loads((TINY / "config.json").read_text())
POLICY = json.loads((TINY_POLICY / "config.json").read_text())
PREPROCESSOR = json.loads((TINY_POLICY / "preprocessor_config.json").read_text())


def harmless(function, *args) -> None:
    with contextlib.suppress(InputError):
        function(*args)


@quick
@given(st.binary(max_size=400))
@pytest.mark.parametrize(
    "read", [read_header, read_json, read_bench, read_result, load_image]
)
def test_any_bytes(tmp_path, read, data):
    (tmp_path / "file").write_bytes(data)
    harmless(read, tmp_path / "file")


@quick
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=4), st.integers(0, 9))
def test_any_header(tmp_path, header, body):
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    harmless(read_header, file)


def changed(whole, data):
    """Return a JSON value with one part replaced or removed."""
    if isinstance(whole, dict) and whole and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(whole)))
        rest = {k: v for k, v in whole.items() if k != key}
        keep = data.draw(st.booleans())
        return rest | {key: changed(whole[key], data)} if keep else rest
    if isinstance(whole, list) and whole and data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(whole) - 1))
        return [*whole[:index], changed(whole[index], data), *whole[index + 1 :]]
    return data.draw(VALUES)


@quick
@given(st.data())
def test_any_config(data):
    harmless(fastvlm.ModelArgs.from_dict, _object(changed(CONFIG, data)))
    config = _object(changed(POLICY, data))
    config["preprocessor"] = changed(PREPROCESSOR, data)
    harmless(openvla.ModelArgs.from_dict, config)


@quick
@given(st.data())
def test_any_statistics(data):
    stats = _object(changed(POLICY["norm_stats"], data))
    harmless(lambda: read_bounds(choose_statistics(stats, None), "action"))


def _object(value) -> dict:
    """Return a dict; other values become empty, as readers refuse them earlier."""
    return dict(value) if isinstance(value, dict) else {}


@quick
@given(st.lists(VALUES.map(json.dumps) | st.text(max_size=30), max_size=5))
def test_any_lines(tmp_path, lines):
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    harmless(read_questions, str(file), 1, None)
    harmless(Journal, file, {"schema": "x"})
    file.write_text("\n".join(['{"schema": "x"}', *lines]), errors="replace")
    Journal(file, {"schema": "x"})
