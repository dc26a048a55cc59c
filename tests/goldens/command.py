"""The command line of the golden scripts, and the comparison with stored values."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

LIMIT = 1e-4  # of the largest value
PACKAGES = ("torch", "timm", "transformers", "tokenizers", "pillow", "numpy")
Values = Mapping[str, np.ndarray]


class Refusal(Exception):
    """Error about an unusable input; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def build_parser(description: str) -> Parser:
    parser = Parser(description=description)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--seed", type=int, help="make a new golden folder from a seed")
    work.add_argument("--check", type=Path, help="compare a golden folder's values")
    parser.add_argument("--output", type=Path, help="the new folder")
    return parser


def run(
    description: str,
    make: Callable[[int, Path], None],
    compute: Callable[[Path], Values],
) -> None:
    """Run `make(seed, folder)` to write a golden folder, or `check` with `compute`."""
    parser = build_parser(description)
    args = parser.parse_args()
    if (args.seed is None) != (args.output is None):
        parser.error("--seed and --output go together")
    if args.seed is not None and args.seed < 0:
        parser.error(f"seed {args.seed} is negative; expected 0 or more")
    try:
        if args.check:
            failed = check(args.check, compute)
            sys.exit(failed > 0)
        make(args.seed, new_folder(args.output))
    except (Refusal, OSError, SafetensorError, json.JSONDecodeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise Refusal(f"{folder} is not empty; give --output a new folder")
    return folder


def read_config(folder: Path, model_type: str) -> dict:
    config = read_json(folder / "config.json")
    if config.get("model_type") != model_type:
        found = config.get("model_type")
        raise Refusal(f"{folder} holds a {found!r}; expected a {model_type!r}")
    return config


def read_json(file: Path) -> dict:
    return json.loads(file.read_text())


def write_json(values: dict, file: Path) -> None:
    file.write_text(json.dumps(values, indent=1))


def write_expected(values: Values, folder: Path) -> None:
    save_file(dict(values), folder / "expected.safetensors")


def as_arrays(values: Mapping) -> dict[str, np.ndarray]:
    """Return tensors or arrays as contiguous float32 and int32 arrays."""
    kinds = {"f": np.float32, "i": np.int32}
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {
        name: np.ascontiguousarray(array, kinds[array.dtype.kind])
        for name, array in arrays.items()
    }


def check(folder: Path, compute: Callable[[Path], Values]) -> int:
    """Print the differences of stored and computed values; return the failures."""
    stored = load_file(folder / "expected.safetensors")
    computed = compute(folder)
    failed = 0
    for name in sorted({*stored, *computed}):
        right, result = compare(stored.get(name), computed.get(name))
        failed += not right
        print(f"{name:<32} {result}{'' if right else '   FAILED'}")
    found = {d.name.lower(): d.version for d in metadata.distributions()}
    versions = [f"{name} {found[name]}" for name in PACKAGES if name in found]
    print(f"{len(stored)} stored, {failed} failed; {', '.join(versions)}")
    return failed


def compare(stored: np.ndarray | None, computed: np.ndarray | None) -> tuple[bool, str]:
    if stored is None or computed is None:
        return False, "not stored" if stored is None else "not computed"
    if stored.shape != computed.shape or stored.dtype != computed.dtype:
        kinds = [f"{a.dtype} {a.shape}" for a in (stored, computed)]
        return False, f"{kinds[0]} stored, {kinds[1]} computed"
    if stored.dtype.kind == "i":
        same = np.array_equal(stored, computed)
        return same, "identical" if same else "different"
    error = float(np.abs(stored - computed).max() / np.abs(stored).max())
    return error <= LIMIT, f"{error:.1e}"
