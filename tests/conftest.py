import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    """Whatever a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)
