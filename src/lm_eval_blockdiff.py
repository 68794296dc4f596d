"""Makes lm-evaluation-harness know `--model blockdiff`, though nobody imported blockdiff.

lm_eval looks for models of others by the entry points `lm_eval.models` in the releases after
0.4.13; 0.4.13 itself has no way to find any. But it imports torch before it looks a model up, and
torch, when it is imported, calls the entry points `torch.backends`: `autoload` is one. In any other
process it does nothing. It stands outside the package, which is not imported for it.
"""

import sys
from importlib import import_module


def autoload() -> None:
    """Called by torch at the end of its import."""
    if "lm_eval" in sys.modules:
        register()


def register() -> None:
    """Names the model to lm_eval; it is imported when it is asked for."""
    import_module("lm_eval.models")  # lm_eval would not, once a name is registered
    from lm_eval.api.registry import model_registry

    if "blockdiff" not in model_registry:
        target = "blockdiff.evaluation.harness:BlockDiffusionLM"
        model_registry.register("blockdiff", target=target)
