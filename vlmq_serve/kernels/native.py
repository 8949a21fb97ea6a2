"""Our C++ kernels: compiled once per machine by the user's compiler, kept in a cache, loaded through ctypes.

Nothing of torch is linked, so one build serves every torch. Each instruction set is a build of its own, with flags that
name it: a home directory shared by unlike machines is safe.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpp"
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "f16c", "fma")
ISAS = {"avx2": ("avx2", "f16c", "fma"), "avx512": _AVX512, "avx512_vnni": (*_AVX512, "avx512_vnni")}
"""By name the features that a build needs, as Linux calls them; worst first."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden")
COMPILERS = ("g++", "clang++", "c++")
CACHE_ENVIRONMENT = "VLMQ_CACHE"

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
    compiler = _compiler()
    if compiler is None:
        logger.warning(
            "no C++ compiler (CXX, %s): slower CPU kernels serve; install one, for example with `apt install g++`",
            ", ".join(COMPILERS),
        )
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler, isa)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        name = " ".join(compiler)
        logger.warning("compiling the CPU kernels with %s failed, slower ones serve: %s", name, detail[-2000:])
        return None
    _declare(loaded)
    return loaded


def _compiler() -> tuple[str, ...] | None:
    """The command; CXX may hold arguments, as in `ccache g++`."""
    names = [name for text in (os.environ.get("CXX", ""), *COMPILERS) if (name := text.split())]
    return next(((path, *arguments) for name, *arguments in names if (path := shutil.which(name))), None)


def _run(command: tuple[str, ...], timeout: int) -> str:
    # A compiler speaks the user's language, perhaps not in the encoding that Python expects.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=True)
    return done.stdout


def _built(compiler: tuple[str, ...], isa: str) -> Path:
    """Path of the shared object; written under another name and moved, as several processes may build at once."""
    flags = (*compiler[1:], *FLAGS, *(f"-m{feature.replace('_', '')}" for feature in ISAS[isa]))
    version = _run((*compiler, "--version"), 60)
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"\0".join([*sources, version.encode(), " ".join(flags).encode()])).hexdigest()[:16]
    folder = cache_folder()
    target = folder / f"integer-{isa}-{key}.so"
    if not target.exists():
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _run((compiler[0], *flags, str(SOURCES / "integer.cpp"), "-o", name), 600)
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)
    return target


def cache_folder() -> Path:
    """VLMQ_CACHE, or `vlmq` in the user's cache folder; a temporary one where that cannot be written, or by others too:
    what lies there is loaded and run."""
    chosen = os.environ.get(CACHE_ENVIRONMENT) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlmq")
    folder = Path(os.path.expanduser(chosen))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.geteuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
        reason = "it must belong to this user, who alone may write there"
    except OSError as error:
        reason = str(error)
    logger.warning("compiled CPU kernels are not kept in %s, and each process compiles its own: %s", folder, reason)
    return Path(_temporary_folder().name)


@lru_cache(maxsize=1)
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="vlmq-", ignore_cleanup_errors=True)


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
