"""`blockdiff tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass

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
    from pathlib import Path

    from blockdiff.data.corpora import load_corpus
    from blockdiff.data.tokenizers import train_tokenizer
    from blockdiff.errors import InputError
    from blockdiff.models.hub import staging

    options = given.make(TokenizerOptions)
    out = Path(options.out)
    if out.exists() and any(out.iterdir()) and not options.overwrite:
        raise InputError(f"{out} is not empty; replace what is there with --overwrite")
    corpus = load_corpus(options.data, text_column=options.text_column)
    tokenizer = train_tokenizer(corpus, options.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    with staging(out) as temporary:
        tokenizer.save_pretrained(temporary)
    print(f"{out}: {len(tokenizer)} tokens, mask token {tokenizer.mask_token!r}")


COMMAND = Command(
    summary="Train a byte-level BPE tokenizer on a corpus.",
    kinds=(TokenizerOptions,),
    run=_run,
    places=("data",),
    sections={"data": "Tokenizer"},
    examples=("blockdiff tokenizer notes.txt --vocab-size 4096 --out runs/tokenizer",),
)
