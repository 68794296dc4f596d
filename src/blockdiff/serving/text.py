"""New tokens as text that can be sent: what was said is never taken back.

The text is made token by token, so that it does not depend on how many came at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blockdiff.sampling.prompts import continuation

_PARTIAL = "\ufffd"  # bytes that are no whole character yet


class Token(NamedTuple):
    """A token, the text that came with it, and its log-probability where it is known."""

    id: int
    text: str
    logprob: float | None


class Writer:
    """The text of one row.

    `stops`: texts that end it and are not part of it. `strip`: leave out blanks it begins with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        strip: bool = False,
    ) -> None:
        self.tokenizer, self.stops, self.strip = tokenizer, stops, strip
        self.ids: list[int] = []
        self.text = ""  # that was given out
        self.ended = False  # by one of the stops
        self._before = list(prompt[-16:])
        self._partial: list[int] = []
        self._held = ""  # what may begin one of the stops
        self._tokens: list[Token] = []  # whose text was not given out yet
        self.made = 0  # characters of the tokens whose text was given out
        self._left_out = 0  # characters it began with that were stripped

    def write(
        self, ids: Sequence[int], logprobs: Sequence[float | None] | None = None, last: bool = False
    ) -> tuple[str, list[Token]]:
        """More text, and the tokens it is whole with; with `last` also what was held back."""
        if self.ended:
            self.ids += ids
            return "", []
        for place, one in enumerate(ids):
            self.ids.append(one)
            self._partial.append(one)
            text = continuation(self.tokenizer, self._before, self._partial)
            if text.endswith(_PARTIAL):
                text = ""
            else:
                self._take()
            self._hold(text)
            logprob = None if logprobs is None else logprobs[place]
            self._tokens.append(Token(one, text, logprob))
        if last and self._partial:
            text = continuation(self.tokenizer, self._before, self._partial)
            self._hold(text)
            self._tokens[-1] = self._tokens[-1]._replace(text=text)
            self._take()
        return self._give(last)

    def _take(self) -> None:
        self._before = [*self._before, *self._partial][-16:]
        self._partial = []

    def _hold(self, text: str) -> None:
        if self.strip and not self.text and not self._held:
            bare = text.lstrip()
            self._left_out += len(text) - len(bare)
            text = bare
        self._held += text

    def _give(self, last: bool) -> tuple[str, list[Token]]:
        places = [(self._held.find(stop), len(stop)) for stop in self.stops]
        found = [(at + length, at) for at, length in places if at >= 0]
        keep = 0
        if found:  # the first to be complete, whatever came with it
            self.ended, self._held = True, self._held[: min(found)[1]]
        elif not last:
            keep = max((_begun(self._held, stop) for stop in self.stops), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self.text += text
        given: list[Token] = []
        whole = len(self.text) + self._left_out
        # Those of a character that is not whole wait for its last.
        while (
            len(self._tokens) > len(self._partial)
            and self.made + len(self._tokens[0].text) <= whole
        ):
            token = self._tokens.pop(0)
            self.made += len(token.text)
            given.append(token)
        return text, given


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)
