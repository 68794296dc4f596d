"""From documents to token ids, in batches, as plain text: no special token comes out of text."""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from blockdiff.data.tokenizers import bos_id, eos_id
from blockdiff.errors import InputError
from blockdiff.progress import track

# An encoding costs about 140 bytes a character while it is made, so a whole book is cut up.
_BATCH = 2**20  # characters
_LONGEST_PIECE = 2**17  # characters
_SEAM = re.compile(r"(?<=\S)\n(?=\S)")
_SEAM_TRIALS = 8
_SEAM_CONTEXT = 256  # characters


def encode_pieces(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos: bool,
    eos: bool,
    progress_to: int | None = None,
) -> Iterator[tuple[np.ndarray, bool]]:
    """Encode documents one after the other, a long one in several pieces.

    The tokenizer adds no tokens of its own, and a special token spelt out in a text is encoded
    as the plain characters it is.

    Args:
        documents: the texts.
        tokenizer: any tokenizer of transformers.
        bos: begin each document with `bos_id(tokenizer)`.
        eos: end each document with `eos_id(tokenizer)`.
        progress_to: characters there are in all, documents counting as one more each, to tell on
            stderr how far it is; None tells nothing.

    Returns:
        An iterator of (int32 array [tokens of a piece], whether its document ends there).

    Raises:
        InputError: the tokenizer has no such token, or a text is not Unicode or encodes to the
            mask id all the same.
    """
    first = _special("BOS", bos_id(tokenizer)) if bos else []
    last = _special("EOS", eos_id(tokenizer)) if eos else []
    batches: Iterable[list[tuple[str, bool]]] = _batches(_pieces(documents, tokenizer))
    if progress_to is not None:
        batches = track(batches, "Tokenising, MiB of text", -(-progress_to // _BATCH))
    return _encode(batches, tokenizer, first, last)


def mark_windows(
    pieces: Iterable[tuple[np.ndarray, bool]], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Whole windows of `length` tokens: BOS, length − 2 of the pieces' tokens, EOS.

    As the paper's public code packs LM1B and the texts of its zero-shot table. What fills no window
    at the end is dropped. Raises `InputError` when the tokenizer lacks one of the two (`bos_id`,
    `eos_id`), or nothing fits between them.
    """
    first, last = _special("BOS", bos_id(tokenizer)), _special("EOS", eos_id(tokenizer))
    if length < 3:
        raise InputError(f"`length` is {length}; between a window's marks it must be at least 3")

    def windows() -> Iterator[tuple[np.ndarray, bool]]:
        carry = np.empty(0, np.int32)
        for ids, ends_document in pieces:
            tokens = np.concatenate([carry, ids])
            full = len(tokens) // (length - 2) * (length - 2)
            bodies = tokens[:full].reshape(-1, length - 2)
            marked = np.pad(bodies, ((0, 0), (1, 1)))
            marked[:, :1], marked[:, -1:] = first, last
            carry = tokens[full:]
            yield marked.ravel(), ends_document

    return windows()


def utf8(document: str) -> Iterator[bytes]:
    """The bytes of a text, piece by piece; `InputError` when it is not valid Unicode."""
    for begin in range(0, len(document), _BATCH):
        piece = document[begin : begin + _BATCH]
        try:
            yield piece.encode()
        except UnicodeEncodeError as error:
            around = piece[max(0, error.start - 20) : error.start]
            raise InputError(
                f"a document holds half a surrogate pair after {around!r}: repair or drop it"
            ) from error


def _special(kind: str, token: int | None) -> list[int]:
    if token is None:
        raise InputError(
            f"`{kind.lower()}` is true, but the tokenizer has no {kind} token; set it to false or "
            "use a tokenizer that has one"
        )
    return [token]


def _encode(
    batches: Iterable[list[tuple[str, bool]]],
    tokenizer: PreTrainedTokenizerBase,
    first: list[int],
    last: list[int],
) -> Iterator[tuple[np.ndarray, bool]]:
    before = first
    for batch in batches:
        encoded = _ids_of([text for text, _ in batch], tokenizer)
        for (text, ends_document), ids in zip(batch, encoded, strict=True):
            if tokenizer.mask_token_id in ids:
                raise InputError(
                    f"the text {text[:40]!r}... encodes to the mask token "
                    f"{tokenizer.mask_token!r}: remove it from the text or choose another one"
                )
            after = last if ends_document else []
            yield np.array([*before, *ids, *after], np.int32), ends_document
            before = first if ends_document else []


def _ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # windows are cut later, so "longer than the maximum length" is no news
    )
    return encoding["input_ids"]


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends its document): documents, the long ones cut where it is safe."""
    for document in documents:
        for _ in utf8(document):  # the tokenizer itself would only speak of a wrong type
            pass
        start = 0
        while len(document) - start > _LONGEST_PIECE:
            seam = _find_seam(document, start + _LONGEST_PIECE, tokenizer)
            if seam is None:
                break
            yield document[start:seam], False
            start = seam
        yield document[start:], True


def _find_seam(document: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Where to cut without changing the ids: both sides apart must encode as they do together."""
    for _, newline in zip(range(_SEAM_TRIALS), _SEAM.finditer(document, start), strict=False):
        seam = newline.end()
        left = document[max(0, seam - _SEAM_CONTEXT) : seam]
        right = document[seam : seam + _SEAM_CONTEXT]
        together, before, after = _ids_of([left + right, left, right], tokenizer)
        if together == before + after:
            return seam
    return None
