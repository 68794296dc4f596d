"""Tokenizers: training one, loading one, and the ids the rest of the package asks them for."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from blockdiff import checks, folders
from blockdiff.data.corpora import load_corpus, looks_like_path
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import staging
from blockdiff.progress import track
from blockdiff.starter import packaged

END_OF_TEXT = "<|endoftext|>"
MASK_TOKEN = "<|mask|>"

_SMALLEST_VOCABULARY = 256 + 2  # every byte, END_OF_TEXT and MASK_TOKEN
_LONGEST_PART = 2**20  # characters
_SEAM = re.compile(r"(?<=\S\n)(?=\S)")
_NO_LIMIT = int(1e30)  # what transformers itself uses for "no maximum length"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; any text survives encoding and decoding unchanged.

    `<|endoftext|>` is its BOS, EOS and padding, `<|mask|>` its mask token with the last id. A
    corpus with too few distinct pairs gives fewer than `vocab_size` tokens.

    Args:
        documents: training text, read once.
        vocab_size: number of tokens with the two special ones, at least 258.

    Raises:
        InputError: `vocab_size` has no room for all bytes and the special tokens.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_in_parts(documents), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    add_mask_token(tokenizer)
    return tokenizer


def _in_parts(documents: Iterable[str]) -> Iterator[str]:
    """Documents, the long ones cut between lines, where byte-level BPE starts a word anyway.

    The trainer keeps about 40 bytes a character of what it is given at once.
    """
    for document in documents:
        begin = 0
        while len(document) - begin > _LONGEST_PART:
            seam = _SEAM.search(document, begin + _LONGEST_PART)
            if seam is None:
                break
            yield document[begin : seam.start()]
            begin = seam.start()
        yield document[begin:]


def check_vocab_size(vocab_size: object) -> None:
    """Raises `InputError` where a byte-level BPE cannot have so many tokens."""
    needed = "; 256 bytes and 2 special tokens have to find room"
    checks.whole_number("vocab_size", vocab_size, _SMALLEST_VOCABULARY, meaning=needed)


def write_tokenizer(
    data: str | Sequence[str],
    out: str | Path,
    vocab_size: int,
    text_column: str = "text",
    overwrite: bool = False,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on the corpus `data` (see `train_tokenizer`) and saves it in `out`.

    `overwrite`: replace the tokenizer that is there. Raises `InputError` for bad input, before
    anything that was in the folder is touched.
    """
    check_vocab_size(vocab_size)
    with folders.claim(out, overwrite=overwrite, kinds=("tokenizer",)) as folder:
        corpus = load_corpus(data, text_column=text_column)
        tokenizer = train_tokenizer(track(corpus, "Reading documents"), vocab_size)
        folders.clear(folder, kinds=("tokenizer",))
        with staging(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    return tokenizer


def load_tokenizer(source: str | Path, mask_token: str = MASK_TOKEN) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its id on the Hugging Face hub, and give it a mask.

    As `read_tokenizer`; `mask_token`: the mask token to add if the tokenizer has none.
    """
    return add_mask_token(read_tokenizer(source), mask_token)


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its id on the Hugging Face hub, as it is.

    Code that comes with a tokenizer is never run. The maximum length it was saved with, a limit
    of the model it belonged to, is lifted.

    Args:
        source: folder or hub id; `starter` is that of the model that comes with the package.

    Raises:
        InputError: there is no such folder, the hub cannot be reached or has no such tokenizer,
            or what is there is no tokenizer.
    """
    source = packaged(source)
    is_path = isinstance(source, Path) or looks_like_path(source)
    folder = Path(source).expanduser()
    if is_path and not folder.is_dir():
        raise InputError(f"no tokenizer in {source}: there is no such folder")
    try:
        tokenizer = _class_of(folder).from_pretrained(
            str(folder) if folder.is_dir() else source, trust_remote_code=False
        )
    # Beside OSError, the hub's clients and the many file formats raise errors of their own.
    except Exception as error:
        hint = "" if folder.is_dir() else " (no such folder, and not found on the hub)"
        raise InputError(
            f"cannot load the tokenizer {source}{hint}: {first_line(error)}"
        ) from error
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


# A class of a published folder's own → the one of transformers that it is a copy of.
_COPIES = {"DreamTokenizer": Qwen2Tokenizer}


def _class_of(folder: Path) -> Any:
    """What opens the tokenizer in a folder."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return _COPIES.get(config["tokenizer_class"], AutoTokenizer)
    except (OSError, ValueError, TypeError, KeyError):
        return AutoTokenizer


def add_mask_token(
    tokenizer: PreTrainedTokenizerBase, mask_token: str = MASK_TOKEN
) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a mask token one, with a new last id; returns the tokenizer.

    Raises:
        InputError: `mask_token` is already an ordinary token of this vocabulary.
    """
    if tokenizer.mask_token is not None:
        return tokenizer
    if mask_token in tokenizer.get_vocab():
        raise InputError(
            f"the tokenizer has no mask token, and {mask_token!r} is an ordinary one of its "
            "tokens; name a new one as `mask_token`"
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})
    return tokenizer


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that begins a document: BOS, else CLS, else EOS, else None."""
    return _first_of(tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a document: EOS, else SEP, else None."""
    return _first_of(tokenizer.eos_token_id, tokenizer.sep_token_id)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides which ids a text becomes.

    It is the same after saving and loading, and does not change with how the tokenizer was
    called last.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call that padded or truncated.
        del pipeline["padding"], pipeline["truncation"]
    else:
        pipeline = {
            "class": type(tokenizer).__qualname__,
            "vocabulary": tokenizer.get_vocab(),
            "options": tokenizer.init_kwargs,
        }
    special = tokenizer.special_tokens_map
    text = json.dumps([pipeline, special], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _first_of(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)
