"""What is being built of a MIL function: variables with their MLX shapes."""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Value:
    """A MIL variable and its MLX shape.

    The variable broadcasts to `shape`, or has more dimensions that merge into it.
    """

    var: object
    shape: tuple[int, ...]

    @property
    def constant(self) -> np.ndarray | None:
        return self.var.val

    @property
    def is_merged(self) -> bool:
        return len(self.var.shape) > len(self.shape)


@dataclass
class Builder:
    """Adds operations to the MIL function being built, named after their part."""

    part: str
    count: int = 0
    made: dict = field(default_factory=dict)

    def __call__(self, kind: str, **inputs):
        from coremltools.converters.mil import Builder as mb

        self.count += 1
        return getattr(mb, kind)(name=f"{self.part}_{self.count}_{kind}", **inputs)

    def constant(self, array: np.ndarray) -> Value:
        array = _narrow(np.asarray(array))
        return Value(self("const", val=array), array.shape)

    def dense(self, value: Value):
        """A variable of exactly the value's shape."""
        var, shape = value.var, value.shape
        if tuple(var.shape) == shape:
            return var
        key = (var, shape)
        if key not in self.made:
            if math.prod(var.shape) == math.prod(shape):
                self.made[key] = self("reshape", x=var, shape=shape)
            else:
                aligned = (1,) * (len(shape) - len(var.shape)) + tuple(var.shape)
                if aligned != tuple(var.shape):
                    var = self("reshape", x=var, shape=aligned)
                reps = [n // m for n, m in zip(shape, aligned, strict=True)]
                self.made[key] = self("tile", x=var, reps=reps)
        return self.made[key]

    def elementwise(self, kind: str, shape: tuple, **inputs: Value) -> Value:
        """An operation that broadcasts its inputs as NumPy does."""
        given = {
            name: self.dense(value) if value.is_merged else value.var
            for name, value in inputs.items()
        }
        return Value(self(kind, **given), shape)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Core ML's number types: float32, int32 and bool."""
    if array.dtype == bool:
        return array
    whole = np.issubdtype(array.dtype, np.integer)
    return array.astype(np.int32 if whole else np.float32, copy=False)
