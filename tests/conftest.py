"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test that fails, fails again."""
    torch.manual_seed(0)
