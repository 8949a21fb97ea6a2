"""Where the compiled kernels are kept. What lies there is loaded and run: nobody but root and this user may have put it
there, or be able to change it, or put another folder in its place."""

import errno
import grp
import logging
import os
import pwd
import stat
import struct
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

CACHE_ENVIRONMENT = "VLMQ_CACHE"

logger = logging.getLogger(__name__)


class Unwritable(Exception):
    """A folder takes no file, or none that can be loaded; the text says which, why, and what to do."""


class BuildFailed(Exception):
    """What ends a build and is no fault of the folder; the text says why."""


def kept(name: str, build: Callable[[Path], None]) -> Path:
    """The file `name` of the cache; where it is not there `build` writes it, for this process alone if the cache cannot
    be written. `build` may leave other files beside the path that it is given; an OSError of it is the folder's."""
    folder = cache_folder()
    reason = _fault(folder)
    if reason is None:
        if _usable(folder / name):
            return folder / name
        try:
            if os.access(folder, os.W_OK):
                return _write(folder / name, build)
            reason = "the folder cannot be written, and lacks those of this version for this CPU and compiler"
        except Unwritable as error:
            reason = str(error)
    _warn(folder, reason)
    return _write(Path(_temporary_folder().name, name), build)


@lru_cache(maxsize=16)
def _warn(folder: Path, reason: str) -> None:
    """Once, though several libraries may be wanted: neither argument names one."""
    logger.warning("compiled CPU kernels are not kept in %s, and each process compiles its own: %s", folder, reason)


def cache_folder() -> Path:
    """VLMQ_CACHE, or `vlmq` in the user's cache folder; need not exist. Without links, whose targets could change."""
    chosen = os.environ.get(CACHE_ENVIRONMENT) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vlmq")
    return Path(os.path.realpath(os.path.expanduser(chosen)))


def _fault(folder: Path) -> str | None:
    """Why the folder, made if it is missing, is not used; None where it may be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours_alone(folder.stat()):
            return "it must belong to this user or to root, and nobody else may write there"
        if _forbids_running(folder):
            return _noexec(folder)
        above = next((parent for parent in folder.parents if not _holds_ours(parent.stat())), None)
    except OSError as error:
        return str(error)
    if above is None:
        return None
    return (
        f"{above}, in which it lies, must belong to this user or to root, and nobody else may write there; change that "
        f"(chmod go-w), or set {CACHE_ENVIRONMENT} to another folder"
    )


def _forbids_running(folder: Path) -> bool:
    """As many containers do with /tmp: a library there can be written, and not be loaded."""
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def _noexec(folder: Path) -> str:
    remedy = f"set {CACHE_ENVIRONMENT} to a folder on another"
    return f"what lies on the disk of {folder} cannot be run (it is mounted noexec); {remedy}"


def _ours_alone(status: os.stat_result) -> bool:
    # An access control list that lets others write shows in the group's bits.
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _holds_ours(folder: os.stat_result) -> bool:
    """Whether nobody else can put another folder in the place of one of ours in this one, as ssh asks of keys."""
    if folder.st_uid not in (0, os.geteuid(), _owner_beyond_namespace()):
        return False
    others = stat.S_IWOTH if _has_private_group(folder) else stat.S_IWGRP | stat.S_IWOTH
    # In a sticky folder such as /tmp others may write, but neither move nor remove what is ours.
    return bool(folder.st_mode & stat.S_ISVTX) or not folder.st_mode & others


def _has_private_group(folder: os.stat_result) -> bool:
    """Whether the group is the owner alone: many systems give each user a group of the same name, and a umask that lets
    it write."""
    try:
        owner, group = pwd.getpwuid(folder.st_uid), grp.getgrgid(folder.st_gid)
    except KeyError:
        return False
    own = (owner.pw_gid, owner.pw_name) == (group.gr_gid, group.gr_name)
    return own and set(group.gr_mem) <= {owner.pw_name}


@lru_cache(maxsize=1)
def _owner_beyond_namespace() -> int | None:
    """Whom the machine's own folders seem to belong to in a container that does not know the machine's root."""
    try:
        mapped = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        unknown = int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return None
    return None if any(outside == "0" for _, outside, _ in mapped) else unknown


def _usable(path: Path) -> bool:
    """Whether `path` is a file of ours that can be read; a link is none, as its target may be anywhere."""
    try:
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and _ours_alone(status) and _is_whole(path, status.st_size)
    except OSError:
        return False


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
    except (OSError, BuildFailed) as error:
        if _tells_of_full_disk(error):
            remedy = f"free some space, or set {CACHE_ENVIRONMENT} to a folder on another"
            raise Unwritable(f"the disk of {target.parent} is full; {remedy}") from error
        if isinstance(error, BuildFailed):
            raise
        # Whatever os.access said: it does not know what a server of files, or a broken disk, will do.
        remedy = f"set {CACHE_ENVIRONMENT} to another folder"
        raise Unwritable(f"{target.parent} cannot be written ({error.strerror}); {remedy}") from error


def _tells_of_full_disk(error: Exception) -> bool:
    """Whether the system, or a compiler in the system's words, has found no room."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


@lru_cache(maxsize=1)
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """Removed when the process ends."""
    try:
        made = tempfile.TemporaryDirectory(prefix="vlmq-", ignore_cleanup_errors=True)
    except OSError as error:
        remedy = f"set {CACHE_ENVIRONMENT} to a folder that can be written"
        raise Unwritable(f"no temporary folder can be made ({error.strerror}); {remedy}") from error
    if _forbids_running(Path(made.name)):
        made.cleanup()
        raise Unwritable(_noexec(Path(made.name)))
    return made
