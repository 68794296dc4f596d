"""Windows of conversations, of which the responses alone are trained.

A response is a document with all that it answers before it. Documents lie side by side in a window;
at L' = 4, of questions and answers of one token and an end of turn ".":

    tokens      Q1 A1  .  .   Q1 A1  . Q2   A2  .  .  .    0  0  0  0
    documents    0  0  0  0    1  1  1  1    1  1  1  1   −1 −1 −1 −1
    maskable        ×  ×  ×                  ×  ×  ×  ×

So a network is trained as it is sampled: a conversation's second answer reads the first one as the
template writes it there, some without its thoughts, and no token of an answer sees what comes after
it. Were a conversation one document, the rest of an answer's last block would hold the beginning of
the next question, unmasked; the network would see where the answer ends.

The end-of-turn token fills the rest of the last block, and counts: sampling fixes all of a block,
in any order, and cuts the text at its end. At L' = 1 nothing is to be filled, and answers of
which each begins with the whole document before share one.

Every document begins at a multiple of all block sizes: a block that held the end of one and the
beginning of another would be noised as one, and would hold less of its own than the blocks that are
sampled. Where a model's blocks begin at the end of the prompt (`prompt_grid` "prompt_end"), a
prompt is padded on the left, for its response to begin with a block.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from blockdiff.data.chat_templates import SEAM, ChatTemplate, Encoder
from blockdiff.data.packing import Windows, find_or_build, read_again, read_once
from blockdiff.data.tokenizers import eos_id
from blockdiff.errors import InputError
from blockdiff.progress import track

_PADDING = -2  # as a mark; else a mark is 2 · document + 1 for a maskable token
_OPEN_WINDOWS = 32  # that wait for a document which fits


class Document(NamedTuple):
    """Tokens, the padding before them, where responses begin and end, and these as UTF-8."""

    ids: list[int]
    left: int
    responses: list[tuple[int, int]]
    bytes: int


class Conversations:
    """Turns the documents of `data.rows` into tokens.

    Args:
        tokenizer: with its chat template, where the format is chat.
        format: chat or prompt.
        block: every document takes a multiple of so many tokens, the least common multiple of the
            block sizes.
        prompt_grid: the model's convention.

    Raises:
        InputError: the tokenizer has no chat template, or one that is none, or no EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, format: str, block: int, prompt_grid: str
    ) -> None:
        self.tokenizer, self.format, self.block = tokenizer, format, block
        self.prompt_grid = prompt_grid
        end = eos_id(tokenizer)
        if end is None:
            raise InputError(
                "the tokenizer has no EOS token to end a response with; use one that has"
            )
        self.end = end
        self.ends = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self.encoder = (
            ChatTemplate(tokenizer) if format == "chat" else Encoder(tokenizer, split=True)
        )

    def documents(self, text: str) -> list[Document]:
        """A conversation's documents, in the order of its responses."""
        found: list[Document] = []
        for prompt, response in self._turns(text):
            before = [*self.encoder.beginning, *self.encoder.encode(prompt, first=True)]
            answer = [*self.encoder.encode(response)]
            size = len(response.replace(SEAM, "").encode())
            if not answer or answer[-1] not in self.ends:
                answer.append(self.end)
            ids, begin = before + answer, max(1, len(before))
            if begin == len(ids):  # nothing comes before a document's first token
                continue
            if self.tokenizer.mask_token_id in ids:
                raise InputError(
                    f"the conversation {text[:60]!r}... encodes to the mask token "
                    f"{self.tokenizer.mask_token!r}: remove it from the text or choose another one"
                )
            last = found[-1] if found and self.block == 1 else None
            if last is not None and ids[: len(last.ids)] == last.ids:
                both = [*last.responses, (begin, len(ids))]
                found[-1] = Document(ids, 0, both, last.bytes + size)
                continue
            left = -begin % self.block if self.prompt_grid == "prompt_end" else 0
            ids += [ids[-1]] * (-(left + len(ids)) % self.block)
            found.append(Document(ids, left, [(begin, len(ids))], size))
        return found

    def _turns(self, text: str) -> Iterator[tuple[str, str]]:
        """(what is before it, the response) of each response of a conversation."""
        told, template = json.loads(text), self.encoder
        if not isinstance(template, ChatTemplate):
            yield told[0], told[1]
            return
        for i, message in enumerate(told):
            if message["role"] != "assistant":
                continue
            whole = template.render(told[: i + 1])
            if i:
                prompt = template.render(told[:i], answer=True)
            else:  # templates write no beginning without a message
                prompt = whole[: max(0, whole.find(template.apart(message["content"])))]
            if not whole.startswith(prompt):
                raise InputError(
                    "the chat template writes other words before an answer than it gives to answer "
                    f"to, in the conversation {text[:60]!r}...; name another one as `chat_template`"
                )
            yield prompt, whole[len(prompt) :].rstrip()  # behind the end of the turn


def pack_conversations(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str,
    length: int,
    block: int,
    prompt_grid: str = "absolute",
    cache_dir: Path | None = None,
    progress: bool = False,
    name: str = "the corpus",
) -> Windows:
    """Windows of `length` tokens of conversations (see `data.rows`), or find them in the cache.

    Their `conversations` counts what became of them: `conversations`; of their `responses` those
    `cut` at the end of a window, and those `left_out` because their prompts fill it; and `empty`,
    the conversations without a response. `tokens` are those that are maskable, and `corpus_tokens`
    and `bytes` those of all responses.

    Args:
        documents: read twice.
        tokenizer: of the model; of a chat with its template.
        format: chat or prompt.
        length: tokens in a window, a multiple of `block`.
        block: least common multiple of the block sizes.
        prompt_grid: where blocks begin, the model's convention.
        cache_dir: as of `pack`.
        progress: tell on stderr how far it is.
        name: what the conversations are called in messages.

    Raises:
        InputError: as `Conversations`; no response fits; a conversation that the template does not
            write or that encodes to the mask token; the cache cannot be written.
    """
    encoder = Conversations(tokenizer, format, block, prompt_grid)
    documents, text = read_once(documents, progress, name)
    settings = {
        "conversations": 1,  # raise it when the windows change
        "kind": format,
        "template": tokenizer.get_chat_template() if format == "chat" else None,
        "length": length,
        "block": block,
        "prompt_grid": prompt_grid,
    }
    again: Iterable[str] = read_again(documents, text)
    if progress:
        again = track(again, "Tokenising conversations")
    write = partial(_write, texts=again, encoder=encoder, length=length, name=name)
    return find_or_build(cache_dir, text, tokenizer, settings, write)


def _write(
    ids_file: BinaryIO,
    marks_file: BinaryIO,
    *,
    texts: Iterable[str],
    encoder: Conversations,
    length: int,
    dtype: str,
    name: str,
) -> dict[str, Any]:
    """Streams the windows to disk; returns their counts for `meta.json`."""
    counts = dict.fromkeys(("conversations", "responses", "cut", "left_out", "empty"), 0)
    whole: Counter[str] = Counter()
    windows = tokens = 0
    for ids, marks in _windows(
        _fitting(texts, encoder, length, counts, whole), length, encoder.end
    ):
        ids_file.write(ids.astype(dtype).tobytes())
        marks_file.write(marks.astype("<i4").tobytes())
        windows += 1
        tokens += int((marks & 1).sum())
    if windows == 0:
        raise InputError(
            f"{name} has no response that fits: of {counts['responses']}, the prompts alone fill "
            f"`length` {length}; give a larger one"
            if counts["responses"]
            else f"{name} has no response in {counts['conversations']} conversations"
        )
    return {
        "windows": windows,
        "tokens": tokens,
        "padded": True,
        "conversations": counts,
        **whole,
    }


def _fitting(
    texts: Iterable[str],
    encoder: Conversations,
    length: int,
    counts: dict[str, int],
    whole: Counter[str],
) -> Iterator[Document]:
    """Documents cut at `length` tokens, if something of a response is left.

    Adds to `counts`, and to `whole` the tokens and bytes of responses, cut or not.
    """
    for text in texts:
        documents = encoder.documents(text)
        counts["conversations"] += 1
        counts["empty"] += not documents
        for ids, left, responses, size in documents:
            whole["corpus_tokens"] += sum(end - begin for begin, end in responses)
            whole["bytes"] += size
            room = length - left
            kept = [(begin, min(end, room)) for begin, end in responses if begin < room]
            counts["responses"] += len(responses)
            counts["left_out"] += len(responses) - len(kept)
            counts["cut"] += sum(end > room for begin, end in responses if begin < room)
            if kept:
                yield Document(ids[:room], left, kept, size)


def _windows(
    documents: Iterable[Document], length: int, padding: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids [length], marks [length]): each document in the first of a few windows it fits into."""
    waiting: list[list[Document]] = []
    used: list[int] = []
    for document in documents:
        size = document.left + len(document.ids)
        place = next((i for i, full in enumerate(used) if full + size <= length), len(used))
        if place == len(used):
            waiting.append([])
            used.append(0)
        waiting[place].append(document)
        used[place] += size
        if used[place] == length or len(waiting) > _OPEN_WINDOWS:
            full = max(range(len(used)), key=used.__getitem__)
            del used[full]
            yield _window(waiting.pop(full), length, padding)
    for window in waiting:
        yield _window(window, length, padding)


def _window(documents: list[Document], length: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    ids, marks = np.full(length, padding), np.full(length, _PADDING)
    place = 0
    for number, (own, left, responses, _) in enumerate(documents):
        place += left
        ids[place : place + len(own)] = own
        marks[place : place + len(own)] = 2 * number
        for begin, end in responses:
            marks[place + begin : place + end] += 1
        place += len(own)
    return ids, marks


def words_of(documents: Iterable[str]) -> Iterator[str]:
    """What is said in documents of conversations, for a tokenizer to be trained on."""
    for document in documents:
        for part in json.loads(document):
            yield part if isinstance(part, str) else part["content"]
