"""Compiling C++ with the compiler that the user has; what was built is kept (`native_cache`)."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vlmq_serve.kernels.native_cache import BuildFailed, Unwritable, kept

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden")
COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_S = 600


def load(
    name: str, source: str, flags: Sequence[str], links: Sequence[str] = ()
) -> tuple[ctypes.CDLL | None, list[str]]:
    """The library of `source` by the first compiler whose build can be loaded, and what the ones before it said; both
    empty where there is no compiler. `name` begins the file's; `links` come after the source. Where no folder can be
    used the other compilers are not tried."""
    failures: list[str] = []
    for compiler in _compilers():
        try:
            return ctypes.CDLL(str(_built(compiler, name, source, flags, links))), failures
        except Unwritable as error:
            return None, [*failures, str(error)]
        except (OSError, BuildFailed) as error:
            failures.append(f"{' '.join(compiler)}: {str(error).strip()[-2000:]}")
    return None, failures


def sources() -> list[bytes]:
    """All of the C++."""
    return [path.read_bytes() for path in sorted(SOURCES.iterdir())]


def _compilers() -> list[tuple[str, ...]]:
    """The commands that there are, in the order to try; CXX may hold arguments, as in `ccache g++`."""
    names = (text.split() for text in (os.environ.get("CXX", ""), *COMPILERS))
    commands = ((path, *name[1:]) for name in names if name and (path := shutil.which(name[0])))
    return list(dict.fromkeys(commands))


def _run(command: tuple[str, ...], timeout: int, **variables: str) -> str:
    """What it prints, in English: a compiler's version is part of a file's name, its words tell that a disk is full."""
    environment = {**os.environ, "LC_ALL": "C", **variables}
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=True, env=environment)
    except OSError as error:
        raise BuildFailed(str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{_text(error.stderr)}\nnot done after {timeout} s") from error
    except subprocess.CalledProcessError as error:
        raise BuildFailed(_text(error.stderr) or str(error)) from error
    return _text(done.stdout)


def _text(output: bytes | None) -> str:
    """Not left to Python, which gives bytes of a program that runs out of time even where text is asked for."""
    return (output or b"").decode(errors="replace")  # names of files come in whatever encoding the user has


def _built(compiler: tuple[str, ...], name: str, source: str, flags: Sequence[str], links: Sequence[str]) -> Path:
    """Path of the shared object, compiled unless the cache holds it."""
    options = (*compiler[1:], *FLAGS, *flags)
    version = _run((*compiler, "--version"), 60)
    key = hashlib.sha256(b"\0".join([*sources(), version.encode(), " ".join([*options, *links]).encode()]))

    def build(path: Path) -> None:
        # What lies between source and library goes to the same folder, as that is the one known to have room or not.
        command = (compiler[0], *options, str(SOURCES / source), *links, "-o", str(path))
        _run(command, TIMEOUT_S, TMPDIR=str(path.parent))
        if not path.exists():
            raise BuildFailed("ended well, and has written nothing")

    return kept(f"{name}-{key.hexdigest()[:16]}.so", build)
