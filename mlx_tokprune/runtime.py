"""Set-up of the machine for MLX: BLAS, streams of threads, and the device's name.

MLX's Linux wheel links the reference BLAS. An OpenBLAS that is loaded first, with
global symbols, takes its place. It comes from a wheel (`ngsolve-openblas` on x86-64,
which picks its kernels by the processor; `cmeel-openblas` on ARM), which expects the
system's Fortran runtime; without one, the copy in MLX's wheel is loaded. This module
imports MLX only inside functions, because BLAS has to come first.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

_FORTRAN = b"libgfortran.so.5"
# Without it, OpenBLAS's threads spin for tens of milliseconds after each product, on
# cores that MLX's threads need: `benchmarks/under_load.py`.
_NO_SPINNING = ("OPENBLAS_THREAD_TIMEOUT", "4")
_LIBRARIES = (
    "ngsolve_openblas/libopenblas*.so*",
    "cmeel.prefix/lib/libopenblas.so*",
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def _find(pattern: str, roots: Iterable[str]) -> Path | None:
    for root in filter(None, roots):
        for path in sorted(Path(root).glob(pattern)):
            return path
    return None


def _load(path: str | Path) -> None:
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _load_blas(path: Path) -> None:
    """Load OpenBLAS with our setting; NumPy's OpenBLAS must not read it later."""
    name, value = _NO_SPINNING
    ours = name not in os.environ
    if ours:
        os.environ[name] = value
    try:
        _load(path)
    finally:
        if ours:
            del os.environ[name]


def _load_bundled_fortran(roots: list[str]) -> None:
    """Load MLX's bundled libgfortran under the name that OpenBLAS expects.

    Wheel builders rename bundled libraries, and the loader matches by the name inside
    the file, so a copy in memory gets the usual name back.
    """
    quadmath = _find("mlx_cpu.libs/libquadmath*", roots)
    fortran = _find("mlx_cpu.libs/libgfortran*", roots)
    if fortran is None:
        raise OSError("no libgfortran beside mlx")
    if quadmath is not None:
        _load(quadmath)
    bundled = fortran.name.encode() + b"\0"
    renamed = fortran.read_bytes().replace(bundled, _FORTRAN.ljust(len(bundled), b"\0"))
    descriptor = os.memfd_create("libgfortran")
    with os.fdopen(descriptor, "wb") as file:
        file.write(renamed)
        file.flush()
        _load(f"/proc/self/fd/{descriptor}")


def _keep_freed_memory() -> None:
    """Make glibc reuse large blocks: MLX's CPU backend frees every intermediate."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def preload() -> bool:
    """Load OpenBLAS before MLX; return whether it was loaded.

    Without effect outside Linux, if MLX is already imported, or with
    `MLX_TOKPRUNE_BLAS=0`. Never raises: without OpenBLAS, MLX is only slower.
    """
    if sys.platform != "linux" or os.environ.get("MLX_TOKPRUNE_BLAS") == "0":
        return False
    if "mlx.core" in sys.modules:
        return False
    _keep_freed_memory()
    library = next(filter(None, (_find(p, sys.path) for p in _LIBRARIES)), None)
    if library is None:
        return False
    try:
        _load_blas(library)
    except OSError:
        try:
            _load_bundled_fortran(sys.path)
            _load_blas(library)
        except (OSError, AttributeError):  # a libc without memfd_create
            return False
    return True


_LOCAL = threading.local()


class _ThreadEnd:
    """A guard in a thread's storage that clears the thread's MLX streams when freed.

    An interpreter that exits after a thread with streams has ended may abort
    ("terminate called without an active exception"), with plain MLX 0.32.4 as well.
    """

    def __init__(self):
        import mlx.core as mx

        self._clear = mx.clear_streams

    def __del__(self):
        self._clear()


def end_streams_with_thread() -> None:
    """Clear this thread's MLX streams when it ends; no effect in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    if not main and not hasattr(_LOCAL, "end"):
        _LOCAL.end = _ThreadEnd()


def device_name() -> str:
    """Return the name of the device that MLX runs on."""
    import mlx.core as mx

    device = mx.default_device()
    return str(mx.device_info(device).get("device_name", device.type.name))
