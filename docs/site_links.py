"""A hook of mkdocs: files outside `docs/` are named on the site, not linked."""

import re

_FOLDERS = "recipes|examples|benchmarks|tests"
_OUTSIDE = re.compile(rf"\[([^\]]+)\]\((?:\.\./)+((?:{_FOLDERS})[^)#]*)[^)]*\)")


def on_page_markdown(markdown: str, **_) -> str:
    """Return the page with links to the repository as text."""
    return _OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
