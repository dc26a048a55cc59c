"""Builder of a MIL function, whose variables carry their MLX shapes."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:  # coremltools is an extra
    from coremltools.converters.mil.mil import Var


@dataclass(frozen=True)
class Value:
    """MIL variable and its MLX shape.

    The variable's own shape can differ: it broadcasts to `shape`, or has additional
    leading dimensions that merge into it.
    """

    var: "Var"
    shape: tuple[int, ...]

    @property
    def constant(self) -> np.ndarray | None:
        """Value of a constant; `None` for a computed variable."""
        return self.var.val

    @property
    def fixed(self) -> np.ndarray:
        """Value of a constant; raise `InputError` for a computed variable."""
        if self.var.val is None:
            raise InputError(f"{self.var.name} is computed; expected a constant")
        return self.var.val

    @property
    def is_merged(self) -> bool:
        """True when the variable has more dimensions than `shape`."""
        return len(self.var.shape) > len(self.shape)


@dataclass
class Builder:
    """Adds operations to the current MIL function, named after their part.

    Attributes:
        part: prefix of operation names, by which `export` selects the precision.
        count: number of operations so far, which makes names unique.
        dense_vars: results of `dense`, so that a broadcast is built once.
    """

    part: str
    count: int = 0
    dense_vars: "dict[tuple[Var, tuple[int, ...]], Var]" = field(default_factory=dict)

    def __call__(self, kind: str, **inputs: Any) -> Any:
        """Add an operation; return its output, or outputs, as coremltools does."""
        from coremltools.converters.mil import Builder as mb

        self.count += 1
        return getattr(mb, kind)(name=f"{self.part}_{self.count}_{kind}", **inputs)

    def constant(self, array: np.ndarray | float) -> Value:
        """Add a constant, as float32, int32 or bool."""
        array = _narrow(np.asarray(array))
        return Value(self("const", val=array), array.shape)

    def dense(self, value: Value) -> "Var":
        """Return a variable of exactly the value's shape: reshaped or tiled."""
        var, shape = value.var, value.shape
        if tuple(var.shape) == shape:
            return var
        key = (var, shape)
        if key not in self.dense_vars:
            if math.prod(var.shape) == math.prod(shape):
                self.dense_vars[key] = self("reshape", x=var, shape=shape)
            else:
                aligned = (1,) * (len(shape) - len(var.shape)) + tuple(var.shape)
                if aligned != tuple(var.shape):
                    var = self("reshape", x=var, shape=aligned)
                reps = [n // m for n, m in zip(shape, aligned, strict=True)]
                self.dense_vars[key] = self("tile", x=var, reps=reps)
        return self.dense_vars[key]

    def elementwise(self, kind: str, shape: tuple[int, ...], **inputs: Value) -> Value:
        """Add an operation that broadcasts its inputs as NumPy does.

        MIL broadcasts, too, so only merged inputs must become dense.
        """
        operands = {
            name: self.dense(value) if value.is_merged else value.var
            for name, value in inputs.items()
        }
        return Value(self(kind, **operands), shape)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Convert to float32, int32 or bool, the types of MIL programs here."""
    if array.dtype == bool:
        return array
    is_whole = np.issubdtype(array.dtype, np.integer)
    return array.astype(np.int32 if is_whole else np.float32, copy=False)
