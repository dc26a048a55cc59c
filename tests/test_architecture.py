"""Imports only go down, and models and pruners do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_tokprune"

# Lower floors first; a module may import from its own floor or lower ones.
FLOORS = (
    ("errors", "blas", "files", "features", "image", "prompt", "actions", "intervals"),
    ("models", "pruners", "overlay", "hub", "demo", "convert.checkpoint"),
    ("convert.family", "convert.sidefiles"),
    ("convert.fastvlm", "convert.openvla"),
    ("convert.families",),
    ("loading", "pipeline", "control"),
    ("memory", "budget", "drafting", "temporal"),
    ("coreml",),
    ("commands",),
    ("act_inputs",),
    ("policy", "answering"),
    ("generate", "act", "train", "convert.command", "convert.__main__"),
    ("demo.__main__", "coreml.__main__", "bench", "evaluate"),
    ("report",),
    ("__init__", "convert.__init__"),
)
LATE = ("coremltools", "matplotlib", "torch", "mlx_lm", "transformers", "tokenizers")


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
    for number, names in enumerate(FLOORS):
        for prefix in names:
            if name == prefix or name.startswith(f"{prefix}."):
                if prefix in ("demo", "coreml") and name.endswith("__main__"):
                    continue
                return number
    raise AssertionError(f"{name} has no floor in {__file__}")


def imports(name: str) -> set[str]:
    """The package's modules that this module imports, at the top or in a function."""
    found = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            module = ".".join(base)
            found.add(whole if whole in MODULES else module)
    return {n if n in MODULES else f"{n}.__init__".lstrip(".") for n in found}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_only_go_down(name):
    for imported in imports(name):
        if imported == "convert.__init__" and name != "__init__":
            continue  # a package's face may be used by commands above it
        assert floor(imported) <= floor(name), f"{name} imports {imported}"


def test_models_and_pruners_do_not_know_each_other():
    for name in MODULES:
        for here, there in (("models", "pruners"), ("pruners", "models")):
            if name.startswith(f"{here}."):
                assert not any(i.startswith(there) for i in imports(name)), name


# The training tokenizer is built on tokenizers and only used to train.
@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"train.tokens"}))
def test_heavy_packages_are_imported_where_they_are_used(name):
    for node in ast.parse(MODULES[name].read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for imported in names:
            assert imported.split(".")[0] not in LATE, f"{name} imports {imported}"


def test_files_stay_small():
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 500, name
