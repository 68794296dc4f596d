"""Records how one row of text was denoised, and writes the recording as a page that replays it.

    recorder = Recorder(tokenizer, prompt_length, block_size)
    for step in recorder.follow(stream_tokens(model, prompts, options)):
        ...
    write_page(recorder.recording(), Path("denoising.html"), title="A model writes")

The page is one HTML file: no network, no fonts or scripts from elsewhere.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from blockdiff.errors import InputError
from blockdiff.outputs import to_json, write_text
from blockdiff.sampling.step import Step

_PARTIAL = "\ufffd"  # what a decoder writes for bytes that are no whole character (yet)


@dataclass(frozen=True)
class Event:
    """One network evaluation that wrote something: its number (from 1) and the positions fixed."""

    nfe: int
    positions: list[int]


@dataclass(frozen=True)
class Recording:
    """The denoising of one row, ready for JSON.

    Attributes:
        tokens: Text of each position. The first `length` ones joined are the row's text; further
            ones were fixed along the way but lie past its end (or were never fixed: empty).
        special: Positions of special tokens, such as end-of-text.
        prompt_length: Positions the prompt takes.
        length: Positions of the finished row, prompt and end-of-text included.
        block_size: L', in positions; blocks start at its multiples, each minus `offset`.
        events: What was fixed when, in order.
        nfe: Network evaluations in all; those without an event read the prompt or cached a block.
        seconds: Wall time of the steps until the row was finished, other rows' share included.
        offset: Positions the first block is short of, where blocks begin at the prompt's end.
        edits: What was written over: number of the event (from 1), position, text before.
    """

    tokens: list[str]
    special: list[int]
    prompt_length: int
    length: int
    block_size: int
    events: list[Event]
    nfe: int
    seconds: float
    offset: int = 0
    edits: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Prompt and new text without special tokens."""
        special = set(self.special)
        return "".join(t for i, t in enumerate(self.tokens[: self.length]) if i not in special)

    @property
    def tokens_per_second(self) -> float:
        return (self.length - self.prompt_length) / max(self.seconds, 1e-9)

    def page(self, title: str = "", subtitle: str = "") -> str:
        """The page that replays it, as HTML; `title` and `subtitle` are plain text."""
        # Inside <script> nothing but "<" could end the element, or open a comment that hides its
        # end.
        data = to_json(asdict(self)).replace("<", "\\u003c")
        templates = files("blockdiff") / "templates"
        values = {
            "style": (templates / "denoising.css").read_text("utf-8"),
            "title": html.escape(title),
            "subtitle": html.escape(subtitle),
            "text": html.escape(self.text),
            "recording": data,
        }
        template = (templates / "denoising.html").read_text("utf-8")
        # One pass, so that text which happens to look like a placeholder stays as it is.
        page = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
        return page.encode(errors="replace").decode()

    def _repr_html_(self) -> str:
        page = html.escape(self.page("A text, step by step"))
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="Denoising" '
            'style="width: 100%; height: 36rem; border: 0"></iframe>'
        )


class Recorder:
    """Records one row of a stream of steps while others go on using the steps.

    `prompt_length`: positions of that row's prompt; `block_size`: the L' it is sampled with; `row`:
    its index in the steps' tensors; `prompt_grid`: the model's convention.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        block_size: int,
        row: int = 0,
        prompt_grid: str = "absolute",
    ) -> None:
        self.tokenizer, self.row = tokenizer, row
        self.prompt_length, self.block_size = prompt_length, block_size
        self.offset = -prompt_length % block_size if prompt_grid == "prompt_end" else 0
        self._events: list[Event] = []
        self._edits: list[tuple[int, int, str]] = []
        self._last: Step | None = None
        self._seconds = 0.0
        self._since = time.perf_counter()

    def see(self, step: Step) -> None:
        """Takes in the next step; the time since the one before counts as the step's."""
        now = time.perf_counter()
        if self._last is None or not self._last.done[self.row]:
            self._seconds += now - self._since
        self._since = now
        positions = step.fixed[self.row].nonzero().squeeze(-1).tolist()
        edited = [] if step.edited is None else step.edited[self.row].nonzero().flatten().tolist()
        if positions or edited:
            self._events.append(Event(int(step.nfe[self.row]), positions))
        for position in edited:
            assert self._last is not None
            before = self._last.tokens[self.row, max(position - 1, 0) : position + 1].tolist()
            text = text_pieces(self.tokenizer, before)[-1]
            self._edits.append((len(self._events), position, text))
        self._last = step

    def follow(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yields the steps on, having seen them; the time their consumer takes is not counted."""
        self._since = time.perf_counter()
        for step in steps:
            self.see(step)
            yield step
            self._since = time.perf_counter()

    def recording(self) -> Recording:
        """The recording so far. Raises `InputError` unless the row is finished."""
        if self._last is None or not self._last.done[self.row]:
            raise InputError(f"row {self.row} is not finished; record its steps to the end")
        length = int(self._last.lengths[self.row])
        # Past the end a position can be fixed or still masked.
        held = set(range(length)) | {p for event in self._events for p in event.positions}
        ids = self._last.tokens[self.row, : max(held) + 1].tolist()
        special_ids = set(self.tokenizer.all_special_ids)
        pieces = text_pieces(self.tokenizer, ids[:length])
        pieces += text_pieces(self.tokenizer, ids[length:])
        return Recording(
            tokens=[piece if i in held else "" for i, piece in enumerate(pieces)],
            special=[i for i in sorted(held) if ids[i] in special_ids],
            prompt_length=self.prompt_length,
            length=length,
            block_size=self.block_size,
            offset=self.offset,
            events=list(self._events),
            edits=list(self._edits),
            nfe=int(self._last.nfe[self.row]),
            seconds=self._seconds,
        )


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the decoded text, special tokens included.

    A character whose bytes are spread over several tokens belongs to the last of them, and the
    ones before are empty.
    """

    def decode(first: int, stop: int) -> str:
        return str(tokenizer.decode(list(ids[first:stop]), clean_up_tokenization_spaces=False))

    pieces: list[str] = []
    # Decoded along with the tokens of the last whole piece, as tokenizers that mark words rather
    # than spaces drop the space before the first token they are given.
    context = whole = 0
    for i in range(len(ids)):
        text = decode(context, i + 1)
        if text.endswith(_PARTIAL) and i + 1 < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(decode(context, whole)) :])
        context, whole = whole, i + 1
    return pieces


def write_page(recording: Recording, path: Path, *, title: str, subtitle: str = "") -> None:
    """Writes the page that replays a recording, over an older one too.

    `title` and `subtitle` are plain text. `#step=12` after the page's address opens it paused
    after the twelfth event, `#step=0` before the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, recording.page(title, subtitle))
