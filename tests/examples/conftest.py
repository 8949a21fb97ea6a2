"""`examples` is not installed with the package: these tests import it from the repository root."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def examples_folder() -> Path:
    return ROOT / "examples"
