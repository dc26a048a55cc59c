"""The bugs of `docs/notes/upstream.md` are still in the installed mlx-vlm."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

try:
    VERSION = version("mlx-vlm")
except PackageNotFoundError:
    pytest.skip("needs mlx-vlm", allow_module_level=True)

TEXT = (Path(__file__).parents[1] / "docs" / "notes" / "upstream.md").read_text()
BUG = re.compile(
    r"^## (.+?)$.+?^```python$(.+?)^```$\s+^```text$(.+?)^```$", re.M | re.S
)
BUGS = BUG.findall(TEXT)
SAID = {title: output.strip() for title, _, output in BUGS}


def run(script: str) -> subprocess.CompletedProcess:
    more = {"MLX_DISABLE_COMPILE": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | more | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def printed():
    """Return the result of each script; two scripts run at a time."""
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(run, [script for _, script, _ in BUGS])
        return dict(zip(SAID, done, strict=True))


def test_every_bug_has_a_script_that_stands_alone():
    assert len(BUGS) == TEXT.count("\n## ") == TEXT.count("```python") > 0
    assert not any("tokprune" in script for _, script, _ in BUGS)


@pytest.mark.parametrize("title", SAID)
def test_it_is_still_there(title, printed):
    found = printed[title]
    assert found.stdout.strip() == SAID[title], (
        f"mlx-vlm {VERSION} no longer prints what docs/notes/upstream.md says of "
        f"{title!r}. "
        "If that is fixed upstream, take it out there, and what works around it here; "
        f"if the script is out of date, mend it.\n{found.stderr[-2000:]}"
    )
