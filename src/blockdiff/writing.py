"""What `blockdiff generate` shows: text, a live view, a page, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from blockdiff import checks
from blockdiff.api import continuation, encode_prompts, to_text
from blockdiff.errors import InputError, RunStopped, first_line
from blockdiff.evaluation.score import score_tokens
from blockdiff.models.loading import load_in
from blockdiff.outputs import local_path, new_file, to_json
from blockdiff.printing import plain_console, printable
from blockdiff.progress import advance
from blockdiff.replay import Recorder, write_page
from blockdiff.sampling.defaults import filled
from blockdiff.sampling.generate import collect, stream_tokens
from blockdiff.sampling.guides import bound
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step
from blockdiff.training.signals import Signals, signal_name
from blockdiff.watch import Timed, new_tokens, watch


def write_texts(
    source: str,
    wish: Any,
    options: SamplingOptions,
    device: str | None = None,
    *,
    told: Collection[str] | None = None,
    **opening: Any,
) -> None:
    """Generates as asked and prints; `wish` is the command line's `GenerateOptions`, `opening`
    how `load` opens the model. `told`: those of the `options` that were given, None for all; the
    others are the folder's where it has them.

    A single text is printed while it is written where standard output is a terminal. Raises
    `RunStopped` on Ctrl-C or SIGTERM, with what was written until then printed.
    """
    checks.numbers(samples=wish.samples, delay=wish.delay)
    for name, asked in (("likelihood", wish.likelihood), ("logprobs", options.logprobs)):
        if asked and not wish.json:
            raise InputError(f"`{name}` is shown in JSON: give `json` as well")
    prompts = read_prompts(wish.prompt, wish.prompt_file)
    if wish.page is not None:
        new_file("page", wish.page)
    model, tokenizer, precision = open_to_write(source, wish, device, **opening)
    if wish.compile:
        model.compile_layers()
    options = filled(model, options, told)
    ids = encode_prompts(model, prompts, tokenizer, wish.samples)
    block_size = model.config.sampling_blocks(options.block_size)[1]
    recorder = Recorder(tokenizer, len(ids[0]), block_size, prompt_grid=model.config.prompt_grid)
    given = [prompt for prompt in prompts for _ in range(wish.samples)]

    made: Iterable[Step] = stream_tokens(model, ids, bound(options, model, tokenizer))
    if wish.page is not None:
        made = recorder.follow(made)
    steps = Timed(made)
    console = plain_console(soft_wrap=True)
    view = _Written(console, tokenizer, given, ids, model.config.mask_token_id)
    shown = not wish.json and not wish.watch
    try:
        with _Stopping():
            if wish.watch and not wish.json:
                lengths, config = [len(row) for row in ids], model.config
                watch(
                    steps, tokenizer, lengths, config.mask_token_id, block_size, delay=wish.delay,
                    prompt_grid=config.prompt_grid,
                )  # fmt: skip
            elif shown and console.is_terminal and len(ids) == 1:
                for step in steps:
                    view.show(step)
            else:
                _work(steps, ids, options.max_new_tokens, model.config.mask_token_id)
    except _Stopped as stop:
        if shown and steps.last is not None:
            view.show(steps.last, stopped=True)
            view.end()
        raise stop.as_error(0 if steps.last is None else view.count(steps.last)) from None
    assert steps.last is not None
    eos, longest = model.config.eos_token_id, options.max_new_tokens
    done = to_text(collect(steps.last, ids, eos, longest, steps.seconds), ids, tokenizer)
    if wish.page is not None:
        write_page(recorder.recording(), local_path("page", wish.page), title=f"{source} writes")
    if wish.json:
        record = {
            "model": source,
            "options": asdict(options),
            "precision": precision,
            "device": str(model.device),
            "prompts": given,
            "texts": done.texts,
            "tokens": [len(row) for row in done.tokens],
            "finish": done.finish,
            "rejection_rate": done.rejection_rate,
            "nfe": done.nfe,
            "seconds": done.seconds,
            "tokens_per_second": done.tokens_per_second,
            "tokens_per_nfe": done.tokens_per_nfe,
        }
        if options.logprobs:
            record["path_logprobs"] = done.path_logprobs
        if wish.likelihood:
            scores = score_tokens(model, ids, done.tokens, seed=options.seed, greedy=False)
            record["likelihood"] = [{"nats": s.nats, "error": s.error} for s in scores]
        print(to_json(record, indent=2))
        return
    if shown:
        view.show(steps.last)
        view.end()
    plain_console(stderr=True).print(done.summary(), style="dim")


def open_to_write(
    source: str, wish: Any, device: str | None = None, **opening: Any
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """The model in the number format it writes in, its tokenizer, and that format's name."""
    # The compiler brings weights into order itself.
    few_tokens = not getattr(wish, "compile", False)
    opening |= {"tokenizer": wish.tokenizer, "few_tokens": few_tokens}
    return load_in(source, wish.precision, device, **opening)


def _work(steps: Iterable[Step], ids: Sequence[Sequence[int]], new: int, mask: int) -> None:
    """Runs the steps to their end, telling on stderr how far they are."""
    what = "1 text" if len(ids) == 1 else f"{len(ids)} texts"
    with advance(f"Writing {what}", len(ids) * new, "tokens") as done:
        before = 0
        for step in steps:
            tokens = _fixed(step, ids, mask)
            done(tokens - before)
            before = tokens


def _fixed(step: Step, ids: Sequence[Sequence[int]], mask: int) -> int:
    """How many new tokens there are in all rows."""
    return sum(new_tokens(step, row, len(prompt), mask) for row, prompt in enumerate(ids))


class _Written:
    """Prints the texts, prompts before them, each as far as it is written."""

    def __init__(
        self,
        console: Console,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        ids: Sequence[Sequence[int]],
        mask_token_id: int,
    ) -> None:
        self.console, self.tokenizer, self.mask_token_id = console, tokenizer, mask_token_id
        self.prompts, self.ids = prompts, ids
        self.row = -1  # the last one begun
        self.printed: list[int] = []  # of its tokens

    def count(self, step: Step) -> int:
        return _fixed(step, self.ids, self.mask_token_id)

    def show(self, step: Step, stopped: bool = False) -> None:
        """Prints what there is more of each row; of several rows, in their order."""
        for row in range(max(self.row, 0), len(self.ids)):
            if row > self.row:
                self._begin(row)
            known = step.final(row, len(self.ids[row]), self.mask_token_id)
            new = known[len(self.printed) :]
            text = continuation(self.tokenizer, [*self.ids[row], *self.printed], new)
            # Bytes that are no whole character yet wait for the rest of it.
            if new and (stopped or bool(step.done[row]) or not text.endswith("\ufffd")):
                self.console.out(printable(text), end="", highlight=False)
                self.console.file.flush()
                self.printed = known

    def _begin(self, row: int) -> None:
        if row:
            self.end()
        if len(self.ids) > 1:
            self.console.rule(f"text {row + 1}", style="dim")
        self.console.out(printable(self.prompts[row]), style="bold", end="", highlight=False)
        self.row, self.printed = row, []

    def end(self) -> None:
        self.console.out("", highlight=False)


class _Stopped(KeyboardInterrupt):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def as_error(self, tokens: int) -> RunStopped:
        name = signal_name(self.number)
        return RunStopped(f"stopped by {name} after {tokens} tokens", 128 + self.number)


class _Stopping(Signals):
    """Raises `_Stopped` where Ctrl-C or SIGTERM comes."""

    def note(self, number: int, frame: FrameType | None) -> None:
        super().note(number, frame)
        raise _Stopped(number)


def read_prompts(prompt: str | None, prompt_file: str | None = None) -> list[str]:
    """The prompts of the two options: one text, standard input for "-", or a file's lines.

    Lines end at LF or CRLF, empty ones are passed over. Of standard input, which is read to its end
    and only for "-", the last line's end is left out. Raises `InputError` for what is no UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("`prompt` and `prompt_file` exclude each other; give one")
    if prompt_file is not None:
        path = local_path("prompt_file", prompt_file)
        try:
            text = decoded(path.read_bytes(), str(path))
        except OSError as error:
            raise InputError(f"cannot read the prompts in {path}: {first_line(error)}") from None
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{path} holds no prompt")
        return prompts
    if prompt == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("`prompt` is -, but there is no standard input to read")
        text = decoded(sys.stdin.buffer.read(), "standard input")
        return [text.removesuffix("\n").removesuffix("\r")]
    return ["" if prompt is None else prompt]


def decoded(content: bytes, place: str, first_line: int = 1) -> str:
    """UTF-8, a byte order mark dropped; raises `InputError` with the line of what is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + first_line
        raise InputError(f"{place}, line {line}: not valid UTF-8; save it as UTF-8") from None
