import gc

import huggingface_hub.constants
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def fixed_seed_of_a_module():
    """What a module's shared fixtures draw does not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def imports_are_not_collected():
    """Each training ends in a garbage collection, which takes 0.2 s over all that imports left."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    """Whatever a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test asks the Hugging Face hub, wherever it runs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
