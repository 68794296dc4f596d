"""`blockdiff tokenizer`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from blockdiff.commands.options import Command, Given


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer on a corpus.

    Attributes:
        data: Corpus, as for train.
        out: Folder for the tokenizer.
        vocab_size: Tokens in all, special ones included.
        text_column: Column that holds the text.
        overwrite: Replace a tokenizer that is there.
    """

    data: str | list[str] = "pydoc"
    out: str = "runs/tokenizer"
    vocab_size: int = 2048
    text_column: str = "text"
    overwrite: bool = False


def _run(given: Given) -> None:
    options = given.make(TokenizerOptions)
    from blockdiff.data.tokenizers import write_tokenizer

    tokenizer = write_tokenizer(**asdict(options))
    print(f"{options.out}: {len(tokenizer)} tokens, mask token {tokenizer.mask_token!r}")


COMMAND = Command(
    summary="Train a byte-level BPE tokenizer on a corpus.",
    kinds=(TokenizerOptions,),
    run=_run,
    places=("data",),
    sections={"data": "Tokenizer"},
    examples=("blockdiff tokenizer notes.txt --vocab-size 4096 --out runs/tokenizer",),
)
