"""Watches denoising live in the terminal.

    ╭────────────────────────────────────────────────────────────────────────────╮
    │ The function returns a new iterator over░ items░░ given                    │
    ╰────────────────────────────────────────────────────────────────────────────╯
    9 evaluations · 7 tokens · 143 tokens/s · 0.78 tokens per evaluation

A masked position is one box; what lies behind the block being denoised is not drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.printing import plain_console, printable
from blockdiff.sampling.step import Step

_STYLES = {
    "prompt": "bold",
    "fixed": "",
    "fresh": "black on yellow",
    "fresh without colour": "reverse",
    "masked": "dim",
    "special": "dim",
}
_BOX = "░"
_FRAME_SECONDS = 1 / 30
_PANEL_LINES = 2  # what a panel adds to its text


class Timed:
    """Passes steps on; `seconds` their making took so far, `last` the last of them."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = steps
        self.seconds = 0.0
        self.last: Step | None = None

    def __iter__(self) -> Iterator[Step]:
        steps = iter(self.steps)
        while True:
            begin = time.perf_counter()
            step = next(steps, None)
            self.seconds += time.perf_counter() - begin
            if step is None:
                return
            self.last = step
            yield step


def watch(
    steps: Iterable[Step],
    tokenizer: PreTrainedTokenizerBase,
    prompt_lengths: Sequence[int],
    mask_token_id: int,
    block_size: int,
    console: Console | None = None,
    delay: float = 0.0,
    reply: bool = False,
    prompt_grid: str = "absolute",
) -> Step:
    """Runs the steps to their end, showing them in the terminal, and returns the last one.

    Every row has a panel with its text up to the end of the block being denoised: masked positions
    as boxes, tokens fixed or edited since the last frame highlighted. Where the output is no
    terminal, only the final texts are printed, prompts included.

    `prompt_lengths`: positions of each row's prompt; `block_size`: the L' sampled with; `delay`:
    seconds to wait after each step, not counted in the speed shown; `reply`: prompts are not drawn,
    and nothing is left at the end: the caller prints the text; `prompt_grid`: where blocks begin,
    the model's convention. Raises `InputError` when there are no steps.
    """
    checks.numbers(delay=delay)
    console = plain_console() if console is None else console
    steps = steps if isinstance(steps, Timed) else Timed(steps)
    view = _View(tokenizer, prompt_lengths, mask_token_id, block_size, console, steps, reply)
    view.at_prompt = prompt_grid == "prompt_end"
    if not console.is_terminal or console.is_dumb_terminal:
        for step in steps:
            view.see(step)
        if not reply:
            view.print_texts()
        return view.last
    drawn = -_FRAME_SECONDS
    # The frames vanish and the whole of the final one is printed, however tall it is.
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for step in steps:
                now = time.perf_counter()
                view.see(step)
                if delay or now - drawn >= _FRAME_SECONDS:
                    live.update(view.frame(console.height), refresh=True)
                    view.drawn()
                    drawn = now
                time.sleep(delay)
    finally:  # stopped before the end, too
        if steps.last is not None and not reply:
            view.drawn()
            console.print(view.frame())
    return view.last


def new_tokens(step: Step, row: int, start: int, mask_token_id: int) -> int:
    """A row's tokens behind its prompt so far, those past the end of a finished row not counted."""
    length = int(step.lengths[row])
    if length >= 0:
        return length - start
    return int((step.tokens[row, start:] != mask_token_id).sum())


class _View:
    """Draws the steps it has seen."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_lengths: Sequence[int],
        mask_token_id: int,
        block_size: int,
        console: Console,
        timed: Timed,
        reply: bool,
    ) -> None:
        self.tokenizer, self.prompt_lengths = tokenizer, prompt_lengths
        self.mask_token_id, self.block_size = mask_token_id, block_size
        self.console, self.timed, self.reply = console, timed, reply
        self.special_ids = set(tokenizer.all_special_ids)
        self.at_prompt = False  # whether a row's blocks begin at the end of its prompt
        self._last: Step | None = None
        self._fresh: torch.Tensor | None = None  # positions written since the last frame

    @property
    def last(self) -> Step:
        if self._last is None:
            raise InputError("there are no steps to watch")
        return self._last

    def see(self, step: Step) -> None:
        """Takes in the next step."""
        self._last = step
        fresh = step.fixed if step.edited is None else step.fixed | step.edited
        self._fresh = fresh if self._fresh is None else self._fresh | fresh

    def drawn(self) -> None:
        """Ends the highlight of what the last frame showed as new."""
        self._fresh = None

    def print_texts(self) -> None:
        """Prints the finished texts alone, an empty line between two."""
        for row, ids in enumerate(self.last.tokens.tolist()):
            if row:
                self.console.print()
            length = int(self.last.lengths[row])
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            self.console.print(printable(str(text)), markup=False, highlight=False, soft_wrap=True)

    def frame(self, height: int | None = None) -> Group:
        """The panels and the status line; with `height`, at most so many terminal lines."""
        step = self.last
        counts = [new_tokens(step, row, start, self.mask_token_id)
                  for row, start in enumerate(self.prompt_lengths)]  # fmt: skip
        shown, room = len(counts), None
        if height is not None:
            # Less the status line, one for rows that do not fit, and the cursor's.
            space = max(height - 3, 1 + _PANEL_LINES)
            shown = min(shown, space // (1 + _PANEL_LINES))
            room = space // shown - _PANEL_LINES
        parts: list[Panel | Text] = [
            Panel(
                self._text(row, room),
                title=self._title(row, counts[row]) if len(counts) > 1 else None,
                title_align="left",
                border_style="dim" if step.done[row] else "yellow",
            )
            for row in range(shown)
        ]
        if shown < len(counts):
            parts.append(Text(f"and {len(counts) - shown} more", style="dim"))
        parts.append(self._status(sum(counts)))
        return Group(*parts)

    def _title(self, row: int, count: int) -> str:
        return f"text {row + 1} · {int(self.last.nfe[row])} evaluations · {count} tokens"

    def _status(self, count: int) -> Text:
        nfe = int(self.last.nfe.sum())
        return Text(
            f"{nfe} evaluations · {count} tokens · "
            f"{count / max(self.timed.seconds, 1e-9):.1f} tokens/s · "
            f"{count / max(nfe, 1):.2f} tokens per evaluation",
            style="dim",
            no_wrap=True,
            overflow="ellipsis",
        )

    def _text(self, row: int, lines: int | None) -> Text:
        """A row's text up to its current block; the last `lines` lines of it."""
        ids = self.last.tokens[row].tolist()
        kinds = self._kinds(row, ids)
        text = Text()
        start = 0
        for kind, run in groupby(kinds):
            stop = start + len(list(run))
            if kind == "masked":
                text.append(_BOX * (stop - start), style=_STYLES[kind])
            elif kind != "unshown":
                piece = self._decode(ids[max(start - 1, 0) : start], ids[start:stop])
                if kind == "fresh" and self.console.no_color:
                    kind = "fresh without colour"
                text.append(printable(piece), style=_STYLES[kind])
            start = stop
        if self.reply:  # a blank before the first word belongs to the prompt
            text = text[len(text.plain) - len(text.plain.lstrip()) :]
        if lines is None:
            return text
        inside = max(self.console.width - 4, 1)
        return Text("\n").join(text.wrap(self.console, inside)[-lines:])

    def _kinds(self, row: int, ids: list[int]) -> list[str]:
        """What each drawn position is: a key of `_STYLES`, or "unshown"."""
        start, length = self.prompt_lengths[row], int(self.last.lengths[row])
        kinds = ["unshown" if self.reply else "prompt"] * start + ["fixed"] * (len(ids) - start)
        if self._fresh is not None:
            for i in self._fresh[row].nonzero().squeeze(-1).tolist():
                kinds[i] = "fresh"
        for i, token in enumerate(ids):
            if token in self.special_ids:
                kinds[i] = "unshown" if i < start else "special"
        # Behind the prompt only: an AR model without a mask has a word with the mask's id.
        for i, token in enumerate(ids[start:], start):
            if token == self.mask_token_id:
                kinds[i] = "masked"
        if length >= 0:
            return kinds[:length]
        if "masked" not in kinds:  # a last block that is still edited
            return kinds
        masked = kinds.index("masked")
        inside = (masked - start * self.at_prompt) % self.block_size
        return kinds[: masked - inside + self.block_size]

    def _decode(self, before: list[int], ids: list[int]) -> str:
        """The text of `ids` as it reads after the token before, which may be a mask.

        Tokenizers that mark words rather than spaces drop the space before a text's first word.
        """
        context = str(self.tokenizer.decode(before, clean_up_tokenization_spaces=False))
        text = self.tokenizer.decode(before + ids, clean_up_tokenization_spaces=False)
        return str(text)[len(context) :]
