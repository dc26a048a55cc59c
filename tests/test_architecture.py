"""Imports only go down, and models and pruners do not know each other."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_tokprune"

# Lower floors first; a module may import from its own floor or lower ones.
FLOORS = (
    ("errors", "blas", "doors"),
    (
        "files",
        "features",
        "image",
        "prompt",
        "actions",
        "fast",
        "hub",
        "demo",
        "timing",
        "threads",
    ),
    ("learned",),
    ("convert", "models", "pruners", "overlay", "processor", "chunks"),
    ("carried", "testbed"),
    ("limits", "planning"),
    ("opening", "pipeline"),
    ("loading",),
    ("speculative",),
    ("answer", "robot", "adapters"),
    ("measure",),
    ("coreml", "train"),
    ("bench", "evaluate"),
    ("commands",),
)
# What `python -m` and old imports find; they ask for the command when it is run.
DOORS = ("generate", "act", "attach", "report", "convert.__init__")
LATE = ("mlx_vlm", "mlx_lm", "coremltools", "matplotlib", "torch")
LATE += ("transformers", "tokenizers", "lmms_eval")


def modules() -> dict[str, Path]:
    """Module names below the package, and their files."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "convert", "convert.")):
        for path in folder.rglob("*.py"):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            found[prefix + name] = path
    return found


MODULES = modules()


def floor(name: str) -> int:
    if name in ("__init__", *DOORS) or name.endswith("__main__"):
        return len(FLOORS)
    for number, names in enumerate(FLOORS):
        if name.split(".")[0] in names:
            return number
    raise AssertionError(f"{name} has no floor in {__file__}")


def imports(name: str, late: bool = True) -> set[str]:
    """The package's modules that this module imports; `late`: in functions, too."""
    tree = ast.parse(MODULES[name].read_text())
    found = set()
    package = name.split(".")[:-1]
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if _ours(a.name)}
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
            found.add(whole if whole in MODULES else ".".join(base))
    return {n if n in MODULES else f"{n}.__init__".lstrip(".") for n in found}


def _ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_only_go_down(name):
    if name in DOORS:
        assert not any(i.startswith("commands") for i in imports(name, late=False))
        return
    for imported in imports(name):
        # The options of commands are for commands, wherever those stand.
        if name.endswith("__main__") and imported.startswith(("commands", *DOORS)):
            continue
        assert floor(imported) <= floor(name), f"{name} imports {imported}"


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_scripts_import_what_there_is(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not _ours(node.module or ""):
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name)
                whole = f"{node.module}.{alias.name}"
                assert there or importlib.util.find_spec(whole), f"{path}: {whole}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_a_command(name):
    top = name in DOORS or name.endswith("__main__") or name.startswith("commands.")
    if not top:
        assert not any(i.startswith("commands") for i in imports(name)), name


def test_the_package_imports_no_command():
    code = (
        "import sys, mlx_tokprune; "
        "print([m for m in sys.modules if m.startswith('mlx_tokprune.commands')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_there_is_no_cycle():
    """Neither of modules nor of rooms (folders), doors left out."""
    edges = {n: imports(n) - {n} for n in MODULES if n not in DOORS}
    _assert_acyclic(edges)
    rooms: dict[str, set] = {}
    for name, found in edges.items():
        if "__" not in name:
            mine = rooms.setdefault(_room(name), set())
            mine |= {_room(i) for i in found if i not in DOORS} - {_room(name)}
    _assert_acyclic(rooms)


def _room(name: str) -> str:
    return name.split(".")[0]


def _assert_acyclic(edges: dict[str, set]) -> None:
    edges = {name: set(found) for name, found in edges.items()}
    while edges:
        free = [n for n, found in edges.items() if not found & edges.keys()]
        assert free, f"a cycle among {sorted(edges)}"
        for name in free:
            del edges[name]


def test_convert_knows_no_runtime():
    for name in MODULES:
        if name.startswith("convert.") and "__" not in name:
            outside = {i for i in imports(name) if not i.startswith("convert.")}
            assert outside <= {"errors", "files", "hub"}, name


def test_models_and_pruners_do_not_know_each_other():
    for name in MODULES:
        for here, there in (("models", "pruners"), ("pruners", "models")):
            if name.startswith(f"{here}."):
                assert not any(i.startswith(there) for i in imports(name)), name


def test_families_are_known_where_they_are_made():
    """Others ask a model what it can do, not what it is."""
    free = ("opening", "models.", "train.")
    for name in MODULES:
        if not name.startswith(free):
            families = {"models.fastvlm", "models.openvla", "models.oft"}
            families |= {"models.pi0fast"}
            assert not families & imports(name), name


# The training tokenizer is built on tokenizers and only used to train; the model of
# lmms-eval is one of its classes, and only lmms-eval imports it.
EARLY = {"train.tokens", "adapters.lmms_eval_model"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - EARLY))
def test_heavy_packages_are_imported_where_they_are_used(name):
    for node in ast.parse(MODULES[name].read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        absolute = isinstance(node, ast.ImportFrom) and not node.level
        names += [node.module or ""] if absolute else []
        for imported in names:
            assert imported.split(".")[0] not in LATE, f"{name} imports {imported}"


def test_files_stay_small():
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 500, name
