"""Core ML's planned device for each operation of a package (macOS 14.4 or newer)."""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .export import load_coremltools

if TYPE_CHECKING:  # coremltools is an extra
    from coremltools.models.compute_plan import MLComputePlanDeviceUsage

_DEVICES = {"MLCPU": "CPU", "MLGPU": "GPU", "MLNeuralEngine": "Neural Engine"}


def check_platform() -> None:
    """Raise `InputError` on a system without Core ML."""
    if sys.platform != "darwin":
        raise InputError(
            "only Core ML on macOS reports where operations run; leave out "
            "--compute-plan here"
        )


def compute_plan(package: str | Path) -> dict[str, Counter]:
    """Count a package's operations by preferred device and kind.

    The counts are over all functions. Constants are left out; an operation without a
    report from Core ML counts as `unknown`.
    """
    ct = load_coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        compiled = ct.models.utils.compile_model(
            str(package), str(Path(folder) / "compiled.mlmodelc")
        )
        plan = MLComputePlan.load_from_path(compiled)
        for function in plan.model_structure.program.functions.values():
            for operation in function.block.operations:
                usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
                # Core ML may name an operation with its version, as `ios18.conv`.
                name = operation.operator_name.split(".")[-1]
                if name != "const":
                    device = "unknown" if usage is None else _device(usage)
                    counts.setdefault(device, Counter())[name] += 1
    return counts


def _device(usage: "MLComputePlanDeviceUsage") -> str:
    """Return the name of the device; Core ML's classes are named after it."""
    kind = type(usage.preferred_compute_device).__name__
    return _DEVICES.get(kind.removesuffix("ComputeDevice"), kind)


def format_plan(plan: dict[str, Counter]) -> str:
    """Return a plan as text, one line per device."""
    lines = []
    for device, kinds in sorted(plan.items()):
        names = ", ".join(f"{name} {number}" for name, number in kinds.most_common())
        lines.append(f"  {device}: {kinds.total()} operations ({names})")
    return "\n".join(lines)
