"""A saved folder also opens where this package is installed and was not imported.

config.json names the classes (`auto_map`), and three lines beside it import them: transformers runs
these for who says trust_remote_code. A folder holds no copy of the package's code, and the package
runs no folder's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from blockdiff.outputs import write_text

MODULE = "modeling_blockdiff"
_AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")


class PackagedConfig(PreTrainedConfig):
    """A configuration whose folder says that its network is one of this package's.

    `model_class`: its name in the package, beside the configuration's own.
    """

    model_class: ClassVar[str] = ""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes config.json, and beside it the file that `auto_map` in it names."""
        folder, own = Path(save_directory), type(self).__name__
        self.auto_map = dict.fromkeys(_AUTO_CLASSES, f"{MODULE}.{self.model_class}")
        self.auto_map["AutoConfig"] = f"{MODULE}.{own}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(
            folder / f"{MODULE}.py",
            '"""Opens this folder where blockdiff is installed: pip install blockdiff."""\n\n'
            f"from blockdiff import {self.model_class}, {own}  # noqa: F401\n",
        )
        super().save_pretrained(folder, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: see `DenoiserModel.register_for_auto_class`."""
