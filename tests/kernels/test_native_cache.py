"""Where compiled kernels are kept: who may have written what is loaded, and what happens where nothing can be kept."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vlmq_serve.kernels import native, native_cache

pytestmark = pytest.mark.unit


def test_a_full_disk_that_the_system_tells_of(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another build than a compiler's; the device is full by its nature."""

    def build(path: Path) -> None:
        (Path("/dev/full") if path.parent.parent == fresh else path).write_text("built")

    assert native_cache.kept("kernels.so", build).read_text() == "built"
    assert f"the disk of {fresh} is full" in caplog.text
    assert list(fresh.iterdir()) == []


def test_a_folder_that_only_seems_to_be_writable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a server of files with rules of its own; this folder takes no file from anybody."""
    folder = f"/proc/{os.getpid()}"
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, folder)
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert found() == "built"
    assert f"each process compiles its own: {folder} cannot be written (" in caplog.text
    assert "); set VLMQ_CACHE to another folder" in caplog.text


def test_a_file_that_cannot_be_put_in_its_place(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fresh / "kernels.so").mkdir()
    assert found() == "built"
    assert f"{fresh} cannot be written (Is a directory)" in caplog.text
    assert list(fresh.iterdir()) == [fresh / "kernels.so"]


def test_a_build_that_fails_is_no_fault_of_the_folder(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is not tried again elsewhere."""
    tried = []

    def build(path: Path) -> None:
        tried.append(path)
        raise native_cache.BuildFailed("broken")

    with pytest.raises(native_cache.BuildFailed, match="broken"):
        native_cache.kept("kernels.so", build)
    assert [path.parent.parent for path in tried] == [fresh]
    assert not caplog.records


def mark(path: Path) -> None:
    path.write_text("built")


def put(folder: Path, mode: int = 0o755) -> Path:
    """A library in the cache."""
    path = folder / "kernels.so"
    path.write_text("kept")
    path.chmod(mode)
    return path


def found() -> str:
    """What the file is that would be loaded: `kept` or `built`."""
    return native_cache.kept("kernels.so", mark).read_text()


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`path` belongs to neither root nor this user."""
    if os.geteuid() == 0:
        change_owner(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


def change_owner(path: Path, owner: int, group: int) -> None:
    """Skips where that cannot be: only root may, and not in a container that knows no other user."""
    try:
        os.chown(path, owner, group)
    except OSError as error:
        pytest.skip(f"files cannot be given away here ({error.strerror})")


def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user to whom the folder does not belong; root could write there all the same."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)


def test_the_cache_is_filled_once(fresh: Path) -> None:
    before = os.umask(0o002)
    try:
        assert found() == "built"
    finally:
        os.umask(before)
    path = fresh / "kernels.so"
    assert path.stat().st_mode & 0o777 == 0o755, "others must be able to read it, and not to write"
    path.write_text("kept")
    assert found() == "kept"


def test_a_filled_cache_that_cannot_be_written_is_used(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container image filled by root, served by another user."""
    forbid_writing(monkeypatch)
    path = put(fresh)
    fresh.chmod(0o555)
    assert native_cache.kept("kernels.so", mark) == path
    assert not caplog.records
    other = native_cache.kept("other.so", mark)
    assert other.read_text() == "built"
    assert other.parent != fresh
    assert native_cache.kept("third.so", mark).read_text() == "built"
    (record,) = caplog.records
    assert f"not kept in {fresh}, and each process compiles its own: the folder cannot be" in record.getMessage()
    assert list(fresh.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
def test_cache_that_others_can_write(mode: int, fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is loaded from there: anybody could have put it there under the name that we look for."""
    path = put(fresh)
    fresh.chmod(mode)
    assert found() == "built"
    assert "nobody else may write there" in caplog.text
    assert path.read_text() == "kept"


def test_cache_of_somebody_else(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(fresh)
    give_away(fresh, monkeypatch)
    assert found() == "built"


@pytest.mark.parametrize(
    ("mode", "owner", "group"),
    [(0o777, 0, 0), (0o757, 0, 0), (0o775, 0, 12345), (0o755, 12345, 0), (0o1777, 12345, 0)],
)
def test_a_cache_in_whose_place_others_could_put_another(
    mode: int, owner: int, group: int, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    above = fresh / "above"
    cache = above / "between" / "cache"
    cache.mkdir(mode=0o700, parents=True)
    put(cache)
    if (owner, group) != (0, 0):
        change_owner(above, owner, group)
    above.chmod(mode)
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(cache))
    assert found() == "built"
    assert f"each process compiles its own: {above}, in which it lies, must belong to this user" in caplog.text
    assert "set VLMQ_CACHE to another folder" in caplog.text


@pytest.mark.parametrize("mode", [0o1777, 0o1775, 0o775, 0o755, 0o555])
def test_a_cache_in_an_ordinary_folder(
    mode: int, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One as /tmp, and one that is its owner's and that of the group that is its owner alone."""
    if mode == 0o775 and os.geteuid() != 0:
        pytest.skip("only root has such a group everywhere")
    above = fresh / "above"
    (above / "cache").mkdir(mode=0o700, parents=True)
    put(above / "cache")
    above.chmod(mode)
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(above / "cache"))
    assert found() == "kept"
    assert not caplog.records


def test_a_link_to_the_cache_is_followed_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded lies where it was checked, though the link could change in between."""
    (fresh / "cache").mkdir(mode=0o700)
    (fresh / "link").symlink_to("cache")
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(fresh / "link"))
    assert native_cache.kept("kernels.so", mark) == fresh / "cache" / "kernels.so"


def test_a_container_that_does_not_know_the_root_of_the_machine() -> None:
    """The folders of the machine's root belong to nobody there, and are trusted all the same."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = in_a_namespace_of_its_own()
        except OSError:
            status = 2
        finally:
            os._exit(status)  # whatever is raised: there must be no second pytest
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 2:
        pytest.skip("a namespace of its own, or another user's, cannot be had here")
    assert status == 0


def in_a_namespace_of_its_own() -> int:
    """0 where a cache in /tmp may be used by a user who is the only one that is known, 2 or an OSError where that
    cannot be tried."""
    if os.geteuid() == 0:
        os.setresuid(12345, 12345, 12345)
    user, system = os.geteuid(), ctypes.CDLL(None)
    # PR_SET_DUMPABLE, as the change of user has made /proc/self root's; CLONE_NEWUSER.
    if system.prctl(4, 1, 0, 0, 0) or system.unshare(0x10000000):
        return 2
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    native_cache._owner_beyond_namespace.cache_clear()
    with tempfile.TemporaryDirectory(dir="/tmp") as cache:
        return int(os.stat("/").st_uid in (0, user) or native_cache._fault(Path(cache)) is not None)


@pytest.mark.parametrize("fault", ["others can write it", "its group can write it", "it is somebody else's", "a link"])
def test_a_file_that_others_could_change_is_not_loaded(
    fault: str, fresh: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built again, in its place where that may be written."""
    path = put(fresh, {"others can write it": 0o757, "its group can write it": 0o775}.get(fault, 0o755))
    if fault == "it is somebody else's":
        give_away(path, monkeypatch)
    elif fault == "a link":
        elsewhere = put(tmp_path_factory.mktemp("elsewhere"))
        path.unlink()
        path.symlink_to(elsewhere)
    assert found() == "built"
    assert not path.is_symlink()


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or a CPU without AVX2")
@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_library_that_was_cut_off_is_built_again(fresh: Path, size: int) -> None:
    """Loading it would end the process without a word."""
    assert native.library() is not None
    (built,) = fresh.glob("*.so")
    whole = built.stat().st_size
    assert whole > size
    # In a process of its own: this one has the library in its memory.
    os.truncate(shutil.move(shutil.copy(built, fresh / "copy"), built), size)
    code = "from vlmq_serve.kernels import native; assert native.library() is not None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert built.stat().st_size == whole
