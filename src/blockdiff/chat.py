"""`blockdiff chat`: a conversation in the terminal, or line by line through a pipe.

    > What is a monad?
    A monoid in the category of endofunctors.
    9 tokens · 6 evaluations · 41.2 tokens/s

What is not part of the conversation (how it is written, what was left out) goes to standard error.
"""

from __future__ import annotations

import difflib
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

from blockdiff import checks
from blockdiff.conversation import Answer, Conversation, Reply
from blockdiff.data.chat_templates import PLAIN, ChatTemplate, read_template
from blockdiff.errors import InputError
from blockdiff.models.loading import load_in
from blockdiff.outputs import to_json
from blockdiff.printing import plain_console, printable
from blockdiff.sampling.defaults import filled
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step
from blockdiff.training.signals import Signals
from blockdiff.watch import watch
from blockdiff.writing import decoded

HELP = """\
/reset        forget what was said; the system message stays
/system TEXT  what the system says from now on; without a text, nothing
/denoising    show the block that is being denoised, or no longer
/help         these lines
/exit         end the chat, as Ctrl-D does
Ctrl-C stops an answer and keeps what is written of it."""
# What other programs call them.
_ALIASES = {"/quit": "/exit", "/bye": "/exit", "/q": "/exit", "/clear": "/reset", "/?": "/help"}


def chat(
    source: str,
    wish: Any,
    options: SamplingOptions,
    device: str | None = None,
    *,
    told: Collection[str] | None = None,
    **opening: Any,
) -> None:
    """Holds a conversation; `wish` is the command line's `ChatOptions`, `opening` goes to `load`.

    `told`: those of the `options` that were given, None for all; the others are the folder's where
    it has them.

    Where standard input and output are a terminal, messages are typed there; else each line of
    standard input is one. Raises `InputError` for what cannot be meant, and, outside a terminal,
    for a message that is too long.
    """
    checks.numbers(delay=wish.delay)
    given = None if wish.chat_template is None else read_template(wish.chat_template)
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("there is no standard input to read messages from")
    opening["tokenizer"] = wish.tokenizer
    model, tokenizer, _ = load_in(source, wish.precision, device, **opening)
    options = filled(model, options, told)
    plain = given is None and tokenizer.chat_template is None
    template = ChatTemplate(tokenizer, PLAIN if plain else given)
    talk = Conversation(model, tokenizer, template, options, wish.system)
    face = _Face(talk, wish)
    if plain:
        face.note(
            f"{source} has no chat template: messages are written as “User: … Assistant: …”; "
            "--chat-template names a file with one"
        )
    if face.typed:
        config = model.config
        face.note(
            f"{source}: {config.kind}, block size {config.sampling_blocks(options.block_size)[1]}, "
            f"context of {config.length} tokens; /help tells what else can be typed"
        )
    face.run()


class _Face:
    """Reads messages and shows answers."""

    def __init__(self, talk: Conversation, wish: Any) -> None:
        self.talk, self.json, self.delay = talk, wish.json, wish.delay
        self.denoising = wish.show_denoising
        self.out, self.err = plain_console(soft_wrap=True), plain_console(stderr=True)
        self.typed = sys.stdin.isatty() and self.out.is_terminal and not wish.json
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/denoising": self._denoising,
            "/help": lambda _: self.note(HELP),
        }

    def note(self, text: str) -> None:
        """Tells what is no part of the conversation."""
        self.err.print(printable(text), style="dim", soft_wrap=not self.err.is_terminal)

    def run(self) -> None:
        """Until the input ends, or somebody types /exit."""
        for line in _typed_lines(self.note) if self.typed else _piped_lines():
            message = line.strip()
            message = _ALIASES.get(message, message)
            if message == "/exit":
                return
            name, *rest = message.split(maxsplit=1) or [""]
            try:
                # "/reset" in a sentence is a word of it.
                if name in self.commands and (not rest or name == "/system"):
                    self.commands[name]("".join(rest))
                elif self.typed and re.fullmatch(r"/\w+", message):
                    near = difflib.get_close_matches(message, [*self.commands, "/exit"], n=1)
                    hint = f"did you mean {near[0]}?" if near else "see /help"
                    self.note(f"there is no {message}; {hint}")
                elif message:
                    self._turn(message)
            except KeyboardInterrupt:  # while an answer was put away
                if not self.typed:
                    raise
                self.note("interrupted")
            except InputError as error:
                if not self.typed:
                    raise
                self.note(str(error).replace("`max_new_tokens`", "--max-new-tokens"))

    def _reset(self, _: str) -> None:
        self.talk.reset()
        self.note("a new conversation")

    def _system(self, text: str) -> None:
        self.talk.instruct(text or None)
        self.note(f"the system says: {text}" if text else "the system says nothing")

    def _denoising(self, _: str) -> None:
        self.denoising = not self.denoising
        self.note("the denoising is shown" if self.denoising else "the denoising is not shown")

    def _turn(self, message: str) -> None:
        reply = self.talk.ask(message)
        if reply.dropped:
            one = reply.dropped == 1
            oldest = "turn no longer fits" if one else f"{reply.dropped} turns no longer fit"
            self.note(f"the oldest {oldest} the context: left out from now on")
        try:
            if self.typed:
                with Signals() as signals:
                    self._show(reply, _until(signals, iter(reply)))
            else:
                for _ in reply:
                    pass
        except KeyboardInterrupt:
            if not self.typed:
                raise
            self._print(reply.text(whole=True))
        self._finish(self.talk.keep(reply))

    def _show(self, reply: Reply, steps: Iterator[Step]) -> None:
        """The text as it is written, or the block that is being denoised and then the text."""
        self.printed = ""
        if self.denoising and not self.out.is_dumb_terminal:
            config, options = self.talk.model.config, self.talk.options
            watch(
                steps, self.talk.tokenizer, [len(reply.prompt)], config.mask_token_id,
                config.sampling_blocks(options.block_size)[1], delay=self.delay, reply=True,
                prompt_grid=config.prompt_grid,
            )  # fmt: skip
        else:
            for _ in steps:
                self._print(reply.text())
        self._print(reply.text(whole=True))

    def _print(self, text: str) -> None:
        """What is new of a text of which the beginning is printed."""
        self.out.out(printable(text[len(self.printed) :]), end="", highlight=False)
        self.out.file.flush()
        self.printed = text

    def _finish(self, answer: Answer) -> None:
        if self.json:
            record = {"role": "assistant", **vars(answer), "tokens_per_nfe": answer.tokens_per_nfe}
            print(to_json(record), flush=True)
        elif not self.typed:
            print(printable(answer.content), flush=True)
        else:
            speed = answer.tokens / max(answer.seconds, 1e-9)
            ended = {"stop": "", "length": " · not finished", "interrupted": " · stopped"}
            self.out.print()
            self.note(
                f"{answer.tokens} tokens in {answer.nfe} evaluations, "
                f"{answer.tokens_per_nfe:.2f} each · {speed:.1f} tokens/s" + ended[answer.finish]
            )


def _until(signals: Signals, steps: Iterator[Step]) -> Iterator[Step]:
    """The steps up to a Ctrl-C, which is looked for between them.

    Raised wherever it comes, Python drops it where it comes in a callback of a library.
    """
    for step in steps:
        yield step
        if signals.received == signal.SIGINT:
            raise KeyboardInterrupt
        if signals.received:
            raise SystemExit(128 + signals.received)


def _typed_lines(note: Callable[[str], None]) -> Iterator[str]:
    """What is typed, with the arrow keys' history where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it once it is imported
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /exit ends the chat")
            continue
        except UnicodeDecodeError:
            note("the message is not valid UTF-8; type it as UTF-8")
            continue
        yield line


def _piped_lines() -> Iterator[str]:
    """The lines of standard input, each as it comes."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield decoded(line, "standard input", number)
