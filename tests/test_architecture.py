"""The layering of the package: imports only go down, and there is no cycle.

A room is a folder of the package or a file at its root; an arrow is one room that
imports another, wherever in a file the import stands. Nothing is exempt.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_tokprune"

# Lower floors first. A room imports from lower floors only.
FLOORS = (
    ("errors", "features", "runtime"),
    ("files",),
    ("processing",),
    ("models", "pruners"),
    ("pipeline",),
    ("checkpoints", "cli"),
    ("coreml", "scenes"),
    ("attach", "act", "convert", "generate", "train"),
    ("measure",),
    ("bench", "evaluate", "demo", "methods"),
    ("report", "adapters", "__init__", "__main__"),
)
MOST_ROOMS, MOST_ARROWS, MOST_FLOORS = 26, 150, 11
LATE = ("mlx_vlm", "mlx_lm", "coremltools", "matplotlib", "torch")
LATE += ("transformers", "tokenizers", "lmms_eval")


def modules() -> dict[str, Path]:
    """Return the files of the package by module name."""
    names = {}
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "convert", "convert.")):
        for path in folder.rglob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            names[prefix + name] = path
    return names


MODULES = modules()
MODULE_NAMES = {f"{PACKAGE}.{n}".replace(".__init__", "") for n in MODULES}


def imports(name: str) -> set[str]:
    """Return the package's modules that a module imports, also inside functions."""
    imported = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {a.name.partition(".")[2] for a in node.names if _ours(a.name)}
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        if not node.level:
            if not _ours(node.module):
                continue
            base = node.module.split(".")[1:]
        elif node.module:
            base += node.module.split(".")
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            inside = whole in MODULES or f"{whole}.__init__" in MODULES
            imported.add(whole if inside else ".".join(base))
    return {n if n in MODULES else f"{n}.__init__".lstrip(".") for n in imported}


def _ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def room(name: str) -> str:
    return name.split(".")[0]


def arrows() -> set[tuple[str, str]]:
    """Return all pairs of a room and another room that it imports."""
    pairs = {(room(n), room(i)) for n in MODULES for i in imports(n)}
    return {(above, below) for above, below in pairs if above != below}


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if name in names:
            return number
    raise AssertionError(f"{name} has no floor in {__file__}")


def test_every_floor_holds_rooms_that_there_are():
    rooms = {room(name) for name in MODULES}
    assert rooms == {name for names in FLOORS for name in names}
    assert len(rooms) <= MOST_ROOMS
    assert len(FLOORS) <= MOST_FLOORS


def test_imports_only_go_down():
    up = [pair for pair in arrows() if floor(pair[1]) >= floor(pair[0])]
    assert not up
    assert len(arrows()) <= MOST_ARROWS


def test_there_is_no_circle_of_modules():
    edges = {name: imports(name) - {name} for name in MODULES}
    while edges:
        free = [name for name, below in edges.items() if not below & edges.keys()]
        assert free, f"a circle among {sorted(edges)}"
        for name in free:
            del edges[name]


def test_names_are_unique_where_one_import_could_meet_both():
    """Only a family's files in `models/` and in `convert/` share a name."""
    files = Counter(name.rpartition(".")[2] for name in MODULES)
    twice = {name for name, count in files.items() if count > 1 and "__" not in name}
    for name in twice:
        assert {n for n in MODULES if n.endswith(f".{name}")} == {
            f"models.{name}",
            f"convert.{name}",
        }


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "recipes", "tests"])
def test_scripts_use_what_there_is(folder):
    """Imports, dotted names and the code that a script passes to another Python."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for whole in sorted(names_of_ours(ast.parse(path.read_text()))):
            assert exists(whole), f"{path.relative_to(ROOT)}: {whole}"


def names_of_ours(tree: ast.AST) -> set[str]:
    """Return the dotted names under the package that a script uses."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _ours(node.module or ""):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if _ours(alias.name)}
        elif isinstance(node, ast.Attribute) and _ours(ast.unparse(node)):
            names.add(re.match(r"[\w.]+", ast.unparse(node))[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines = re.findall(rf"^(?:from|import) {PACKAGE}.*\w$", node.value, re.M)
            names |= names_of_ours(ast.parse("\n".join(lines)))
    return names


def exists(whole: str) -> bool:
    """Return whether a dotted name leads to a module or an attribute of one."""
    name, rest = whole, []
    while name not in MODULE_NAMES:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    thing = importlib.import_module(name)
    for attribute in rest:
        if not hasattr(thing, attribute):
            return False
        thing = getattr(thing, attribute)
    return True


def test_nothing_imports_a_command():
    """No module imports a `__main__`; programs use the `__init__`."""
    for name in MODULES:
        assert not [i for i in imports(name) if i.endswith("__main__")], name


def test_the_package_imports_no_command_line():
    code = (
        "import sys, mlx_tokprune; print([m for m in sys.modules "
        "if m.startswith('mlx_tokprune') and m.endswith(('__main__', '.cli'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_families_are_known_where_they_are_made():
    """Only `models`, `convert` and `train` import a model family."""
    families = {"models.fastvlm", "models.openvla", "models.oft", "models.pi0fast"}
    for name in MODULES:
        if room(name) not in ("models", "convert", "train"):
            assert not families & imports(name), name


# The model of lmms-eval is one of its classes, and only lmms-eval imports it.
EARLY = {"evaluate.lmms_eval_model"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - EARLY))
def test_heavy_packages_are_imported_where_they_are_used(name):
    for node in ast.parse(MODULES[name].read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        absolute = isinstance(node, ast.ImportFrom) and not node.level
        names += [node.module or ""] if absolute else []
        for imported in names:
            assert imported.split(".")[0] not in LATE, f"{name} imports {imported}"


def test_recipes_are_not_installed():
    for name in MODULES:
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "recipes", name


def test_files_stay_small():
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 500, name
