"""Measure Core ML packages of a model: size, time, memory, and difference from MLX.

    python benchmarks/coreml_exports.py --model FOLDER [--picture FILE] [--methods ...]

A separate process writes each package, which is read back from disk and run by the
NumPy interpreter of tests/mil.py on one image. The last columns are shares: of the kept
tokens, those that MLX in float32 keeps, too; for merging methods, of all tokens, those
in the same group. Needs the extras coreml and test; runs on Linux, where Core ML itself
does not.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import mlx_tokprune

import mlx.core as mx  # isort: skip
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from mil import Package

from mlx_tokprune import Pruner
from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.pipeline import Scene, look
from mlx_tokprune.processing.image import load_image
from mlx_tokprune.processing.prompt import Prompt
from mlx_tokprune.pruners import as_plan

RECENT = ("divprune", "hiprune", "visionzip", "prumerge", "prumerge_plus")
# method, keep ratios, options of the command
CASES = (
    ("norm", (0.5,), ("--precision", "float32")),
    ("norm", (0.5, 0.25), ("--precision", "float32")),
    ("similarity", (0.5, 0.25), ("--precision", "float32")),
    ("attention", (0.5, 0.25), ("--precision", "float32")),
    ("spatial", (0.5, 0.25), ("--precision", "float32")),
    ("norm", (0.5,), ()),
    ("norm", (0.5, 0.25, 0.11), ()),
    ("similarity", (0.5, 0.25), ()),
    ("attention", (0.5, 0.25), ()),
    ("spatial", (0.5, 0.25), ()),
    *((name, (0.5, 0.25), ("--precision", "float32")) for name in RECENT),
    *((name, (0.5, 0.25), ()) for name in RECENT),
    ("norm", (0.5,), ("--compress", "8bit")),
    ("norm", (0.5,), ("--compress", "6bit")),
    ("norm", (0.5,), ("--compress", "4bit")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--picture", default=str(PICTURES[0].path))
    parser.add_argument("--methods", nargs="+", help="only these")
    alone = "only the first keep ratio of each package, where memory is short"
    parser.add_argument("--alone", action="store_true", help=alone)
    args = parser.parse_args()
    model, processor = mlx_tokprune.load(args.model, mx.float32)
    pixels = processor.pixels([load_image(args.picture)])
    scene = Scene(mx.array(pixels), Prompt(((), ())))
    seen = {}
    print(
        f"{'method, functions, options':44}{'MB':>8}{'s':>7}{'GB':>6}  "
        "function    rel. error      dB  same tokens, groups",
        flush=True,
    )
    for method, ratios, options in CASES:
        if args.methods and method not in args.methods:
            continue
        ratios = ratios[:1] if args.alone else ratios
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vision.mlpackage"
            seconds, memory = export(args.model, path, method, ratios, options)
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6
            kept = ", ".join(f"{ratio:g}" for ratio in ratios)
            head = f"{method}, {kept} {' '.join(options)}"
            head = f"{head:44}{size:8.1f}{seconds:7.1f}{memory:6.1f}"
            package = Package(path)
            for ratio in ratios:
                if (method, ratio) not in seen:
                    pruner = Pruner(method, keep_ratio=ratio)
                    visual = look(model, scene, as_plan(pruner))
                    groups = visual.selection.assignment()
                    seen[method, ratio] = (
                        np.array(visual.embeddings),
                        np.array(visual.selection.indices),
                        None if groups is None else np.array(groups),
                    )
                    mx.clear_cache()
                name = f"keep_{ratio * 100:g}" if len(ratios) > 1 else None
                print(head, compare(package, name, pixels, seen[method, ratio]))
                head = " " * 65
            sys.stdout.flush()


def export(model, path, method, ratios, options) -> tuple[float, float]:
    """Write `path` in a process; return its seconds and peak memory (GB)."""
    command = [sys.executable, "-m", "mlx_tokprune.coreml", "--model", model]
    command += ["--method", method, "--output", str(path), "--keep-ratio"]
    command += [*map(str, ratios), *options]
    start = time.perf_counter()
    child = os.posix_spawn(
        sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_CLOSE, 1)]
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def compare(package: Package, function: str | None, pixels, expected) -> str:
    features, indices, groups = expected
    image = np.round(pixels * 255).astype(np.float32).transpose(0, 3, 1, 2)
    found = package.predict({"image": image}, function)
    same = np.isin(found["kept_indices"], indices).mean()
    joined = "" if groups is None else f"{(found['assignment'] == groups).mean():8.3f}"
    if same < 1:  # compare the tokens that both keep
        both = np.intersect1d(found["kept_indices"], indices)
        here = np.searchsorted(indices[0], both)
        there = np.searchsorted(found["kept_indices"][0], both)
        features, result = features[:, here], found["image_features"][:, there]
    else:
        result = found["image_features"]
    error = np.abs(result - features).max() / np.abs(features).max()
    ratio = (features**2).sum() / ((result - features) ** 2).sum()
    return (
        f" {function or 'main':10}{error:12.1e}{10 * np.log10(ratio):8.1f}{same:12.3f}"
        f"{joined}"
    )


if __name__ == "__main__":
    main()
