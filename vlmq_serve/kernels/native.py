"""Our C++ kernels: compiled once per machine by the user's compiler, kept in a cache, loaded through ctypes.

Nothing of torch is linked, so one build serves every torch. Each instruction set is a build of its own, with flags that
name it: a home directory shared by unlike machines is safe.
"""

import ctypes
import logging
from functools import cache, lru_cache
from pathlib import Path

import torch

from vlmq_serve.kernels import native_build

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "f16c", "fma")
ISAS = {"avx2": ("avx2", "f16c", "fma"), "avx512": _AVX512, "avx512_vnni": (*_AVX512, "avx512_vnni")}
"""By name the features that a build needs, as Linux calls them; worst first."""
FLAGS = ("-fopenmp",)

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Features of the CPU by Linux's names, for example `avx512_vnni`; empty where /proc/cpuinfo does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in text.splitlines() if line.startswith("flags")), frozenset())


@lru_cache(maxsize=1)
def supported_isas() -> tuple[str, ...]:
    """Names in `ISAS` that this CPU has and torch uses (ATEN_CPU_CAPABILITY can forbid AVX512), worst first."""
    flags = cpu_flags()
    capability = torch.backends.cpu.get_cpu_capability()
    wide = capability.startswith("AVX512")
    usable = ("AVX2",) if capability == "AVX2" else ()
    return tuple(n for n, needed in ISAS.items() if flags.issuperset(needed) and (wide or (usable and n == "avx2")))


@cache
def library(isa: str | None = None) -> ctypes.CDLL | None:
    """The kernels for `isa`, by default the best here; compiled at the first call ever. None where that cannot be."""
    found = supported_isas()
    if isa is None and found:
        return library(found[-1])
    if isa is None or isa not in found:
        return None
    flags = (*FLAGS, *(f"-m{feature.replace('_', '')}" for feature in ISAS[isa]))
    loaded, failures = native_build.load(f"integer-{isa}", "integer.cpp", flags)
    if failures:
        serves = "slower kernels serve" if loaded is None else "another compiler's serve"
        logger.warning("compiling the CPU kernels failed, %s\n%s", serves, "\n".join(failures))
    elif loaded is None:
        logger.warning(
            "no C++ compiler (CXX, %s): slower CPU kernels serve; install one, for example with `apt install g++`",
            ", ".join(native_build.COMPILERS),
        )
    if loaded is not None:
        _declare(loaded)
    return loaded


def _declare(loaded: ctypes.CDLL) -> None:
    """C signatures, once."""
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    weight = (pointer, pointer, integer, pointer, integer, long, long)
    signatures = {
        "vlmq_max_rows": (integer, []),
        "vlmq_scratch": (long, [long, long]),
        "vlmq_pack": (None, [pointer, long, long, integer, long, pointer, integer]),
        "vlmq_dequantize": (None, [*weight, long, long, pointer, integer]),
        "vlmq_gemm": (None, [pointer, long, integer, long, *weight, long, pointer, pointer, integer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
