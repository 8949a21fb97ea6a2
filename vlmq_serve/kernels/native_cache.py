"""Where the compiled kernels are kept. What lies there is loaded and run: nobody but root and this user may have put it
there, or be able to change it."""

import errno
import logging
import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

CACHE_ENVIRONMENT = "VLMQ_CACHE"

logger = logging.getLogger(__name__)


class NoRoom(Exception):
    """A disk is full; the text says which and what to do."""


def kept(name: str, build: Callable[[Path], None]) -> Path:
    """The file `name` of the cache; where it is not there `build` writes it, for this process alone if the cache cannot
    be written. `build` may leave other files beside the path that it is given."""
    folder = cache_folder()
    reason = _fault(folder)
    if reason is None:
        if _usable(folder / name):
            return folder / name
        try:
            if os.access(folder, os.W_OK):
                return _write(folder / name, build)
            reason = f"{name} is not there, and the folder cannot be written"
        except NoRoom as error:
            reason = str(error)
    _warn(folder, reason)
    return _write(Path(_temporary_folder().name, name), build)


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


def _write(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, written in a folder of its own and moved, as several processes may build at once."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as staging:
            path = Path(staging, target.name)
            build(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o755)  # whatever the umask: what the group could write would never be loaded
            return path.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        if not _tells_of_full_disk(error):
            raise
        raise NoRoom(
            f"the disk of {target.parent} is full; free some space, or set {CACHE_ENVIRONMENT} to a folder on another"
        ) from error


def _tells_of_full_disk(error: Exception) -> bool:
    """Whether the system, or a compiler in the system's words, has found no room."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    said = getattr(error, "stderr", None) or ""
    return getattr(error, "errno", None) in codes or any(os.strerror(code) in said for code in codes)


@lru_cache(maxsize=1)
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="vlmq-", ignore_cleanup_errors=True)
