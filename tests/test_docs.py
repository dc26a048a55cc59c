"""The documentation: its links resolve, and its command lines parse."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_tokprune.__main__ import commands as known_commands
from mlx_tokprune.__main__ import module_of

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
GLOBS = ("docs/**/*.md", "recipes/**/*.md", "examples/**/*.md")
PAGES = [name for name in TOP if (ROOT / name).exists()] + sorted(
    str(path.relative_to(ROOT)) for glob in GLOBS for path in ROOT.glob(glob)
)
# Scripts whose usage is in their docstring.
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for glob in ("benchmarks/*.py", "recipes/**/*.py", "examples/**/*.py")
    for path in ROOT.glob(glob)
)
MOST_SKIPPED = 0.1  # share of the command lines that cannot be resolved


@functools.cache
def text_of(page: str) -> str:
    """Return a page, or the docstring of a script."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "") if page.endswith(".py") else text


# Blocks and prose -------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Line of a page, in a code block or in prose."""

    number: int
    text: str
    code: bool


def lines_of(text: str) -> list[Line]:
    """Tell the lines of fenced and indented blocks from prose."""
    lines, fence, indent, before = [], "", 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r" *(`{3,}|~{3,})", line)
        if fence:
            code = True
            fence = "" if line.strip() == fence else fence
        elif opening:
            fence, code = opening[1], True
        else:
            depth = len(line) - len(line.lstrip())
            code = bool(line.strip()) and depth >= (indent or 4)
            code = code and bool(indent or not before.strip())
            # A list's paragraphs are indented by less than 4, its blocks by 6.
            indent = (indent or 4) if code or (indent and not line.strip()) else 0
        lines.append(Line(number, line, code))
        before = line
    return lines


# Links ------------------------------------------------------------------------------

LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
REFERENCE = re.compile(r"^ {0,3}\[([^\]]+)\]: +<?([^\s>]+)", re.M)
ATTRIBUTE = re.compile(r"<\w+[^>]*?\b(?:href|src|srcset)=\"([^\"]+)\"")
USED = re.compile(r"\]\[([^\]]+)\]")


def prose_of(page: str) -> str:
    """Return a page without blocks and inline code; line numbers are kept."""
    lines = ("" if line.code else line.text for line in lines_of(text_of(page)))
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", "\n".join(lines), flags=re.S)


def links_of(page: str) -> list[str]:
    """Return the relative links of a page."""
    prose = prose_of(page)
    links = LINK.findall(prose) + ATTRIBUTE.findall(prose)
    links += [target for _, target in REFERENCE.findall(prose)]
    return [link for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|//", link)]


@functools.cache
def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them of its headings."""
    anchors, counts = set(), {}
    for line in lines_of(path.read_text(encoding="utf-8")):
        heading = re.match(r" {0,3}#{1,6} +(.+?)(?: +#+)? *$", line.text)
        if line.code or not heading:
            continue
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        repeats = counts.get(slug, 0)
        counts[slug] = repeats + 1
        anchors.add(f"{slug}-{repeats}" if repeats else slug)
    html = r"<\w+[^>]*?\b(?:id|name)=\"([^\"]+)\""
    return anchors | set(re.findall(html, path.read_text(encoding="utf-8")))


def broken(page: str, link: str) -> str:
    """Return the error of a link, or an empty string."""
    name, _, anchor = link.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    if not path.exists():
        return f"{page}: {link}: no such file"
    if ROOT not in (path.resolve(), *path.resolve().parents):
        return f"{page}: {link}: outside the repository"
    if anchor and path.suffix == ".md" and anchor not in anchors_of(path.resolve()):
        return f"{page}: {link}: no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    errors = [error for link in links_of(page) if (error := broken(page, link))]
    names = {name.lower() for name, _ in REFERENCE.findall(prose_of(page))}
    errors += [
        f"{page}: [{name}] is not defined"
        for name in USED.findall(prose_of(page))
        if name.lower() not in names
    ]
    assert not errors, "\n".join(errors)


def test_links_are_found():
    links = [link for page in PAGES for link in links_of(page)]
    assert len(links) > 50
    assert sum("#" in link for link in links) > 10
    assert broken("README.md", "docs/no-such-page.md").endswith("no such file")
    assert broken("README.md", "docs/methods.md#no-such").endswith("no such heading")
    assert broken("README.md", "docs/methods.md#methods") == ""


# Commands ---------------------------------------------------------------------------

PYTHON = r"(?:[\w./]*/)?python3?"
# What may stand before a command: variables, a timer, a launcher.
BEFORE = re.compile(
    r"(?:[A-Z_]+=\S+ +|/usr/bin/time -v +|mlx\.launch [^|;]*?-- +|\$ +)*"
)
START = re.compile(rf"mlx_tokprune[. ]|{PYTHON} +-m +(?:mlx_tokprune|recipes)\b")
SCRIPT = re.compile(rf"{PYTHON} +((?:\w+/)+\w+\.py)\b")
ASSIGNED = re.compile(r"^(\w+)=(\"[^\"]*\"|'[^']*'|[^\s;]+)$")
LOOP = re.compile(r"^for (\w+) in ([^;]+); *do$")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


@dataclass(frozen=True)
class CommandLine:
    """Command line of a page."""

    page: str
    number: int
    text: str

    def __str__(self):
        return f"{self.page}:{self.number}: {self.text}"


def shell_lines(page: str) -> list[tuple[int, str]]:
    """Return the lines of a page's code blocks; continued lines are joined."""
    joined, number, whole = [], 0, ""
    for line in lines_of(text_of(page)):
        if not line.code:
            number, whole = 0, ""
            continue
        number = number or line.number
        text = line.text.strip()
        whole = f"{whole} {text}".strip()
        quoted = re.match(r"^\w+=\"[^\"]*$", whole)  # goes on behind the line
        if text.endswith("\\"):
            whole = whole[:-1].rstrip()
        elif not quoted:
            joined.append((number, re.sub(r"(^|\s)#.*$", "", whole).strip()))
            number, whole = 0, ""
    return joined


def command_lines(page: str) -> list[CommandLine]:
    """Return the commands of a page, with the page's variables inserted."""
    variables: dict[str, str] = {}

    def value(match: re.Match) -> str:
        return variables.get(match[1] or match[2], match[0])

    commands = []
    for number, text in shell_lines(page):
        if loop := LOOP.match(text):
            variables[loop[1]] = shlex.split(loop[2])[0]  # the first turn
            continue
        text = VARIABLE.sub(value, text)
        if assigned := ASSIGNED.match(text):
            variables[assigned[1]] = assigned[2].strip("\"'")
            continue
        text = text[BEFORE.match(text).end() :]
        if START.match(text) or SCRIPT.match(text):
            commands.append(CommandLine(page, number, text))
    return commands


def resolved(command: CommandLine) -> bool:
    """Return whether a command has no ellipsis, variable or choice in brackets."""
    return not re.search(r"\.\.\.|…|\$|\[.*\||<", command.text)


def split(command: CommandLine) -> tuple[str, list[str]]:
    """Return the module that a command runs, and its arguments.

    Optional arguments in brackets are included.
    """
    text = re.sub(r"(?<=\s)\[(--?\w.*?)\](?=\s|$)", r"\1", command.text)
    words = shlex.split(re.split(r" [|>;&]", text)[0].rstrip(";"))
    if re.fullmatch(PYTHON, words[0]):
        words = words[words.index("-m") + 1 :]
    if words[0] in ("mlx_tokprune", "recipes.testbed.run"):  # the same commands
        return f"mlx_tokprune.{words[1]}", words[2:]
    return words[0], words[1:]


def source_of(module: str) -> tuple[str, Path]:
    """Return the module that `python -m` runs, and its file."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"no module {module!r}"
    if found.submodule_search_locations:
        module = f"{module}.__main__"
        found = importlib.util.find_spec(module)
    origin = found.origin if found else None
    assert origin, f"no module {module!r}"
    return module, Path(origin)


def unknown_flags(text: str, file: Path) -> str:
    """Return the flags that a script's source does not have, as an error."""
    known = set(re.findall(r"--[a-z][a-z-]*", file.read_text(encoding="utf-8")))
    flags = re.findall(r"(?<=[\s\[])--[a-z][a-z-]*", text)
    unknown = [flag for flag in flags if flag not in known]
    return f"{file.name} has no {', '.join(unknown)}" if unknown else ""


@functools.cache
def parser_of(module: str):
    """Return the parser of a command; `None` where it cannot be built here."""
    package, _, name = module.partition(".")
    if package == "mlx_tokprune":
        assert name in known_commands(), f"no command {name!r}"
        return importlib.import_module(module_of(name)).build_parser()
    run = source_of(module)[0]
    try:
        build = getattr(importlib.import_module(run), "build_parser", None)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("mlx_tokprune", "recipes"):
            raise
        return None  # a training's extra that is not installed
    return build and build()


def mistake(command: CommandLine, capsys) -> str:
    """Return the error of a command line, or an empty string."""
    try:
        if script := SCRIPT.match(command.text):
            error = unknown_flags(command.text, ROOT / script[1])
            return f"{command}\n  {error}" if error else ""
        module, arguments = split(command)
        parser = parser_of(module)
        if parser is None:
            error = unknown_flags(command.text, source_of(module)[1])
            return f"{command}\n  {error}" if error else ""
        parser.parse_args(arguments)
    except SystemExit as stop:
        said = capsys.readouterr().err.strip()
        return f"{command}\n  {said}" if stop.code else ""
    except (AssertionError, ImportError, OSError, ValueError, IndexError) as error:
        return f"{command}\n  {error}"
    return ""


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS])
def test_command_lines_parse(page, capsys):
    commands = [command for command in command_lines(page) if resolved(command)]
    errors = [error for command in commands if (error := mistake(command, capsys))]
    assert not errors, "\n".join(errors)


def test_few_command_lines_are_skipped():
    commands = [command for page in PAGES for command in command_lines(page)]
    skipped = [command for command in commands if not resolved(command)]
    assert len(commands) > 100
    assert len(skipped) <= MOST_SKIPPED * len(commands), "\n".join(map(str, skipped))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mlx_tokprune.generate --keep-ratoi 0.5", "unrecognized arguments"),
        ("mlx_tokprune tune --model demo", "no command 'tune'"),
        ("python -m recipes.gone run", "no module 'recipes.gone'"),
        ("python benchmarks/gone.py FOLDER", "No such file"),
        ("python benchmarks/temporal.py --frames 3", "temporal.py has no --frames"),
        ("python -m recipes.testbed.table --aganst norm", "has no --aganst"),
        ("python -m mlx_tokprune.bench --runs 3 [--runs many]", "invalid int value"),
    ],
)
def test_a_wrong_command_line_is_an_error(text, error, capsys):
    assert error in mistake(CommandLine("page", 1, text), capsys)


def test_command_lines_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "Prose `mlx_tokprune.demo`.\n\n"
        "    MUJOCO_GL=egl python -m recipes.policy tune --method norm  # a comment\n"
        '    run="mlx_tokprune bench --runs 3"\n'
        "    for k in one two; do\n"
        "        $run --model $k \\\n            --tokens 8\n"
        "    done\n\n"
        "- A list\n\n      mlx_tokprune.report a.json\n\nMore.\n\n"
        "```\nmlx_tokprune methods $unset\n```\n"
    )
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    commands = command_lines("page.md")
    assert [command.text for command in commands] == [
        "python -m recipes.policy tune --method norm",
        "mlx_tokprune bench --runs 3 --model one --tokens 8",
        "mlx_tokprune.report a.json",
        "mlx_tokprune methods $unset",
    ]
    assert [resolved(command) for command in commands] == [True, True, True, False]
