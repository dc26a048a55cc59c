"""Where Core ML means to run each operation of a package. macOS 14.4 or newer."""

import sys
import tempfile
from collections import Counter
from pathlib import Path

from ..errors import InputError
from .export import load_coremltools

_DEVICES = {"MLCPU": "CPU", "MLGPU": "GPU", "MLNeuralEngine": "Neural Engine"}


def check_platform() -> None:
    """Raise `InputError` where there is no Core ML to ask."""
    if sys.platform != "darwin":
        raise InputError("only Core ML on macOS knows where operations run")


def compute_plan(package: str | Path) -> dict[str, Counter]:
    """Kinds of operations, counted by the device that Core ML prefers for them.

    Of all functions together; constants are left out, and operations of which Core ML
    says nothing count as unknown.
    """
    ct = load_coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    found: dict[str, Counter] = {}
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
                    found.setdefault(device, Counter())[name] += 1
    return found


def _device(usage) -> str:
    kind = type(usage.preferred_compute_device).__name__
    return _DEVICES.get(kind.removesuffix("ComputeDevice"), kind)


def format_plan(plan: dict[str, Counter]) -> str:
    lines = []
    for device, kinds in sorted(plan.items()):
        names = ", ".join(f"{name} {number}" for name, number in kinds.most_common())
        lines.append(f"  {device}: {kinds.total()} operations ({names})")
    return "\n".join(lines)
