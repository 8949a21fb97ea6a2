"""What tests of the compiled kernels share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmq_serve.kernels import native, native_cache


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a process that has not built anything."""
    monkeypatch.setenv(native_cache.CACHE_ENVIRONMENT, str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()
