"""Where the compiled kernels are kept. What lies there is loaded and run: nobody but root and this user may have put it
there, or be able to change it."""

import logging
import os
import stat
import struct
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

CACHE_ENVIRONMENT = "VLMQ_CACHE"

logger = logging.getLogger(__name__)


def kept(name: str, build: Callable[[Path], None]) -> Path:
    """The file `name` of the cache; where it is not there `build` writes it, for this process alone if the cache cannot
    be written."""
    folder = cache_folder()
    reason = _fault(folder)
    if reason is None:
        if _usable(folder / name):
            return folder / name
        if not os.access(folder, os.W_OK):
            reason = f"{name} is not there, and the folder cannot be written"
    if reason is not None:
        _warn(folder, reason)
        folder = Path(_temporary_folder().name)
    _write(folder / name, build)
    return folder / name


@lru_cache(maxsize=16)
def _warn(folder: Path, reason: str) -> None:
    """Once, though several libraries may be wanted."""
    logger.warning("compiled CPU kernels are not kept in %s, and each process compiles its own: %s", folder, reason)


def cache_folder() -> Path:
    """VLMQ_CACHE, or `vlmq` in the user's cache folder; need not exist."""
    chosen = os.environ.get(CACHE_ENVIRONMENT) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlmq")
    return Path(os.path.expanduser(chosen))


def _fault(folder: Path) -> str | None:
    """Why the folder, made if it is missing, is not used; None where it may be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _ours_alone(folder.stat()):
            return None
    except OSError as error:
        return str(error)
    return "it must belong to this user or to root, and nobody else may write there"


def _ours_alone(status: os.stat_result) -> bool:
    # An access control list that lets others write shows in the group's bits.
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _usable(path: Path) -> bool:
    """Whether `path` is a file of ours that can be read; a link is none, as its target may be anywhere."""
    try:
        status = path.lstat()
    except OSError:
        return False
    allowed = stat.S_ISREG(status.st_mode) and _ours_alone(status) and os.access(path, os.R_OK)
    return allowed and _is_whole(path, status.st_size)


def _is_whole(path: Path, size: int) -> bool:
    """Whether a library reaches to the end of its table of sections, which linkers write last: one that a crash has cut
    off would end the process that loads it. What is no library is refused by the loader, but for an empty file."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":
        return size > 0
    if len(header) < 64:
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    return bool(table + entry * count <= size)


def _write(target: Path, build: Callable[[Path], None]) -> None:
    """Written under another name and moved, as several processes may build at once."""
    handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        build(Path(name))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o755)  # whatever the umask: what the group could write would never be loaded
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="vlmq-", ignore_cleanup_errors=True)
