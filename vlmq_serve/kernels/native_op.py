"""`vlmq::gemm_integer` in C++ (`cpp/operator.cpp`), where that compiles: called by torch without Python between."""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from vlmq_serve.kernels import native, native_build, native_cache

NEVER = 1 << 60
logger = logging.getLogger(__name__)


@cache
def register(dense_rows: int | None) -> bool:
    """Give torch's dispatcher the C++ operator with the best kernels here; False where that cannot be.

    From `dense_rows` rows of bf16 x on, it calls `vlmq::gemm_dense`. The schema must be registered.
    """
    kernels = native.library()
    operator = None if kernels is None else _operator()
    if kernels is None or operator is None:
        return False
    functions = [ctypes.cast(getattr(kernels, name), ctypes.c_void_p) for name in ("vlmq_gemm", "vlmq_scratch")]
    operator.vlmq_bind(*functions, kernels.vlmq_max_rows(), NEVER if dense_rows is None else dense_rows)
    return True


def compile_all() -> None:
    """Fill the cache with all that a process here may look for, as for a container image whose users cannot write.

    Raises RuntimeError where something does not compile, or cannot be kept; the reason was logged.
    """
    wanted: dict[str, ctypes.CDLL | None] = {isa: native.library(isa) for isa in native.supported_isas()}
    wanted["operator"] = _operator()
    missing = [name for name, library in wanted.items() if library is None]
    if missing or len(wanted) == 1:
        raise RuntimeError(f"CPU kernels: {', '.join(missing) or 'none for this CPU'} could not be compiled")
    folder = native_cache.cache_folder()
    lost = [name for name, library in wanted.items() if library and Path(library._name).parent != folder]
    if lost:
        raise RuntimeError(f"CPU kernels: {', '.join(lost)} could not be kept in {folder}")


@cache
def _operator() -> ctypes.CDLL | None:
    """The library of the operator, whose loading registers it."""
    folder = Path(torch.__file__).parent
    flags = (f"-I{folder / 'include'}", f'-DVLMQ_TORCH="{torch.__version__}"')
    operator, failures = native_build.load("operator", "operator.cpp", flags, (f"-L{folder / 'lib'}", "-ltorch_cpu"))
    if operator is None:
        if failures:
            logger.warning("small products are called through Python: C++ for torch fails\n%s", "\n".join(failures))
        return None
    operator.vlmq_bind.restype = None
    operator.vlmq_bind.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return operator
