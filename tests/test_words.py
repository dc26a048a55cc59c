"""Names in code and sizes of pages follow the rules in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest
from test_architecture import MODULES

ROOT = Path(__file__).parents[1]
# Names that say nothing of what they hold.
EMPTY = {"found", "known", "asked", "seen", "given"}
# Past and present participles, where a noun is wanted.
PARTICIPLE = re.compile(
    r"^_?(?!Thing|Sampling)[A-Z][a-z]+(?:ing|ed)$|^(Begun|Sent|Seen|Kept)$"
)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_names_say_what_they_hold(name):
    tree = ast.parse(MODULES[name].read_text())
    stored = {
        n.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    parameters = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    assert not EMPTY & (stored | parameters)
    classes = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert not list(filter(PARTICIPLE.match, classes))


def user_pages() -> list[Path]:
    return [p for p in (ROOT / "docs").glob("*.md") if p.name != "api.md"]


def test_pages_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    words = 0
    for page in user_pages():
        text = page.read_text()
        words += len(text.split())
        assert len(text.splitlines()) <= 250, page
    assert words <= 12_000


def test_every_page_is_on_the_site_and_leads_on():
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in listed, page
        if page.name != "api.md":
            assert re.search(r"\]\([^)]+\)|\]: ", page.read_text()), page
