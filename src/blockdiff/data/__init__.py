"""From a corpus to windows of token ids.

The names below are imported on first use, so that reading text does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockdiff.data.corpora import Corpus, load_corpus, split_documents
    from blockdiff.data.packing import StreamedWindows, Windows, pack, stream_windows
    from blockdiff.data.tokenizers import (
        add_mask_token,
        bos_id,
        eos_id,
        fingerprint,
        load_tokenizer,
        train_tokenizer,
    )

__all__ = [
    "Corpus",
    "StreamedWindows",
    "Windows",
    "add_mask_token",
    "bos_id",
    "eos_id",
    "fingerprint",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "split_documents",
    "stream_windows",
    "train_tokenizer",
]

_ROOMS = {
    "corpora": ("Corpus", "load_corpus", "split_documents"),
    "packing": ("StreamedWindows", "Windows", "pack", "stream_windows"),
    "tokenizers": (
        "add_mask_token",
        "bos_id",
        "eos_id",
        "fingerprint",
        "load_tokenizer",
        "train_tokenizer",
    ),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
