"""Rows that all begin together: the engine without later admissions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from blockdiff.checks import whole_number
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step


def stream_tokens(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    rows: Sequence[int] | None = None,
    after: Sequence[Sequence[int]] | None = None,
) -> Iterator[Step]:
    """Yields a `Step` after every network evaluation.

    `prompts`: token ids of each row, none empty, of any lengths. `rows`: each row's number in the
    address of its random numbers, 0, 1, … by default; give a row's number to get it alone. `after`:
    see `Engine.admit_all`.
    Raises `InputError` at once for an empty prompt, one with the mask token, or other ids than the
    model's, and for `rows` that are not as many.
    """
    if not prompts:
        raise InputError("no prompt; give at least one row")
    numbers = None if rows is None else _row_numbers(rows, len(prompts))
    engine = Engine(model)
    engine.admit_all(prompts, options, numbers, after)
    return steps_of(engine)


def steps_of(engine: Engine) -> Iterator[Step]:
    """Steps until no row of the engine goes on."""
    was_training = engine.model.training
    engine.model.eval()
    try:
        while engine.active:
            yield engine.step()
    finally:
        engine.model.train(was_training)


def _row_numbers(rows: Sequence[int], wanted: int) -> list[int]:
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"`rows` is {type(rows).__name__}; it must be a list of row numbers")
    numbers = [whole_number("rows", row, 0) for row in rows]
    if len(numbers) != wanted:
        raise InputError(
            f"`rows` numbers {len(numbers)} rows, but there are {wanted}; give one number for each"
        )
    return numbers


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    `tokens`: new ids of each row, EOS included. `finish`: "eos", "length", "low_entropy" for a text
    that the rule of that name gave up, or "stop" where another rule or a constraint ended it.
    `path_logprobs`: of each new token log p_θ in the evaluation that fixed it, where `logprobs` was
    asked for. Their sum depends on the path; that of the text is bounded by `score_tokens`.
    """

    tokens: list[list[int]]
    nfe: list[int]
    finish: list[str]
    seconds: float
    path_logprobs: list[list[float]] | None = field(default=None, kw_only=True)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over wall time, the prompt's evaluation included."""
        return sum(map(len, self.tokens)) / max(self.seconds, 1e-9)

    @property
    def rejection_rate(self) -> float:
        """Share of the rows given up as too dull."""
        return self.finish.count("low_entropy") / max(len(self.finish), 1)

    @property
    def tokens_per_nfe(self) -> float:
        """New tokens over network evaluations, the prompt's included (TPF, tokens per forward)."""
        return sum(map(len, self.tokens)) / max(sum(self.nfe), 1)


def generate_tokens(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    rows: Sequence[int] | None = None,
    after: Sequence[Sequence[int]] | None = None,
) -> Generation:
    """The last item of `stream_tokens`, with its cost."""
    begin = time.perf_counter()
    *_, step = stream_tokens(model, prompts, options, rows, after)
    seconds = time.perf_counter() - begin
    return collect(step, prompts, model.config.eos_token_id, options.max_new_tokens, seconds)


def collect(
    step: Step,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | None,
    max_new_tokens: int,
    seconds: float,
) -> Generation:
    """The `Generation` a last step describes."""
    tokens = [
        step.tokens[row, len(prompt) : int(step.lengths[row])].tolist()
        for row, prompt in enumerate(prompts)
    ]

    def ended(new: list[int], given_up: bool, stopped: bool) -> str:
        if given_up:
            return "low_entropy"
        if new and new[-1] == eos_token_id:
            return "eos"
        return "stop" if stopped or len(new) < max_new_tokens else "length"

    stopped = step.rejected if step.stopped is None else step.stopped
    facts = zip(tokens, step.rejected.tolist(), stopped.tolist(), strict=True)
    finish = [ended(*row) for row in facts]
    logprobs = None
    if step.logprobs is not None:
        starts = map(len, prompts)
        logprobs = [
            step.logprobs[row, start : start + len(tokens[row])].tolist()
            for row, start in enumerate(starts)
        ]
    return Generation(tokens, step.nfe.tolist(), finish, seconds, path_logprobs=logprobs)
