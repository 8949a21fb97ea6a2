"""`vlmq::gemm_integer` in C++ (`cpp/operator.cpp`), where that compiles: called by torch without Python between."""

import ctypes
import logging
from functools import cache
from pathlib import Path

import torch

from vlmq_serve.kernels import native, native_build

NEVER = 1 << 60
logger = logging.getLogger(__name__)


@cache
def register(dense_rows: int | None) -> bool:
    """Give torch's dispatcher the C++ operator with the best kernels here; False where that cannot be.

    From `dense_rows` rows of bf16 x on, it calls `vlmq::gemm_dense`. The schema must be registered.
    """
    kernels = native.library()
    if kernels is None:
        return False
    folder = Path(torch.__file__).parent
    flags = (f"-I{folder / 'include'}", f'-DVLMQ_TORCH="{torch.__version__}"')
    operator, failures = native_build.load("operator", "operator.cpp", flags, (f"-L{folder / 'lib'}", "-ltorch_cpu"))
    if operator is None:
        logger.info(
            "small products are called through Python, as C++ for torch does not compile\n%s", "\n".join(failures)
        )
        return False
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    operator.vlmq_bind.restype, operator.vlmq_bind.argtypes = None, [pointer, pointer, long, long]
    functions = [ctypes.cast(getattr(kernels, name), pointer) for name in ("vlmq_gemm", "vlmq_scratch")]
    operator.vlmq_bind(*functions, kernels.vlmq_max_rows(), NEVER if dense_rows is None else dense_rows)
    return True
