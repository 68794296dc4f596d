"""Generation block by block (algorithm 2 of the paper).

    for each block: start from masks; fix positions until none is masked, each step reading the
    cached clean blocks before it; the first of these steps also runs the block finished before,
    beside its own, and appends that one's keys and values

Sampling is a generator of `Step`s: text, terminal view and pages all consume the same steps.
Rows have their own blocks, their own progress and their own random numbers: a row's tokens are the
same alone and in a batch, whatever the others do, in float32 (docs/precision.md).

Shapes: B rows, n rows still active, S canvas length, K block size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.cache import BlockCache
from blockdiff.categorical import real_dtype, uniform
from blockdiff.checks import whole_number
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import total_noise
from blockdiff.sampling.analytic import analytic
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.order import arrival_rate, events, next_positions
from blockdiff.sampling.progress import ORDER, Progress, Step


def stream_tokens(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    rows: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Yields a `Step` after every network evaluation.

    `prompts`: token ids of each row, none empty, of any lengths. `rows`: each row's number in the
    address of its random numbers, 0, 1, … by default; give a row's number to get it alone.
    Raises `InputError` at once for an empty prompt, one with the mask token, or other ids than the
    model's, and for `rows` that are not as many.
    """
    _check(model, prompts, options)
    numbers = range(len(prompts)) if rows is None else _row_numbers(rows, len(prompts))
    return _stream(model, prompts, options, torch.tensor(numbers, device=model.device))


def _row_numbers(rows: Sequence[int], wanted: int) -> list[int]:
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise InputError(f"`rows` is {type(rows).__name__}; it must be a list of row numbers")
    numbers = [whole_number("rows", row, 0) for row in rows]
    if len(numbers) != wanted:
        raise InputError(
            f"`rows` numbers {len(numbers)} rows, but there are {wanted}; give one number for each"
        )
    return numbers


def _stream(
    model: Denoiser, prompts: Sequence[Sequence[int]], options: SamplingOptions, row_ids: Tensor
) -> Iterator[Step]:
    canvas, starts = _canvas(model, prompts, options)
    walk = _autoregressive if model.config.causal else _blocks
    if options.sampler == "analytic":
        walk = analytic
    was_training = model.training
    model.eval()
    # The mode is entered for each step only, never while the consumer runs.
    steps = walk(model, canvas, starts, row_ids, options)
    try:
        while True:
            with torch.inference_mode():
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        model.train(was_training)


def _check(model: Denoiser, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> None:
    config = model.config
    if options.sampler == "analytic" and config.kind != "sedd":
        raise InputError(
            f"the analytic sampler reads the scores of SEDD, and this is {config.kind}: use "
            "first_hitting or ancestral"
        )
    if not prompts:
        raise InputError("no prompt; give at least one row")
    for prompt in prompts:
        if not len(prompt):
            raise InputError("an empty prompt: start it with the beginning-of-text token")
        if config.mask_token_id in prompt and not config.causal:
            raise InputError("a prompt contains the mask token; take it out")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(
                f"a prompt's token ids run outside the model's vocabulary of {config.vocab_size}; "
                "is this the model's tokenizer?"
            )
    config.choose_block_size(options.block_size)
    if config.kind == "sedd":
        longest = max(len(prompt) for prompt in prompts) + options.max_new_tokens
        if longest > config.length or options.block_size not in (None, config.length):
            raise InputError(
                f"SEDD writes within its context of {config.length} tokens, in one block; prompt "
                f"and new tokens come to {longest}: lower `max_new_tokens`"
            )


def _canvas(
    model: Denoiser, prompts: Sequence[Sequence[int]], options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """Prompts followed by masks [B, S], and each row's prompt length [B]."""
    starts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    size = int(starts.max()) + options.max_new_tokens
    block = model.config.block_size if options.block_size is None else options.block_size
    size += -size % block
    canvas = torch.full((len(prompts), size), model.config.mask_token_id, device=model.device)
    for row, prompt in enumerate(prompts):
        canvas[row, : len(prompt)] = torch.as_tensor(prompt, device=model.device)
    return canvas, starts


def _blocks(
    model: Denoiser, canvas: Tensor, starts: Tensor, row_ids: Tensor, options: SamplingOptions
) -> Iterator[Step]:
    """Block diffusion. With L' = L nothing is cached and the window moves by half of itself."""
    config = model.config
    size = config.block_size if options.block_size is None else options.block_size
    capacity = config.length - size
    stride = size if capacity else max(size // 2, 1)
    progress = Progress(model, canvas, starts, row_ids, options)
    cache = model.new_cache(len(canvas), min(capacity, canvas.shape[1]), size)
    # The block with the first free position; without a cache, one with as much before it as fits.
    first = starts // stride * stride
    if not capacity:
        first = (first + stride - size).clamp(min=0)
    # Blocks are sampled whole; a window of MDLM only as far as text is wanted.
    limit = (progress.ends + size - 1) // size * size if capacity else progress.ends
    everyone = torch.arange(len(canvas), device=canvas.device)
    if capacity and int(first.max()) > 0:
        _prefill(model, cache, canvas, first, size, config.length)
        yield progress.step(everyone[first > 0], everyone[:0], everyone[:0])
    offset = torch.arange(size, device=canvas.device)
    event = torch.zeros(len(canvas), size, dtype=torch.int64, device=canvas.device)
    arrival = torch.zeros(len(canvas), size, dtype=real_dtype(canvas.device), device=canvas.device)
    uncached = torch.zeros(len(canvas), dtype=torch.bool, device=canvas.device)

    def look(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, tokens and what is still to be fixed, [n, K], of the rows' blocks."""
        position = first[rows, None] + offset
        x = _read(canvas, rows, position, config.mask_token_id)
        return position, x, (x == config.mask_token_id) & (position < limit[rows, None])

    def open_blocks(rows: Tensor) -> None:
        """Plans the rows' blocks, after moving on from those in which nothing is left to fix."""
        complete = rows
        while len(complete := complete[~look(complete)[2].any(-1)]):
            first[complete] += stride
            uncached[complete] = capacity > 0
        position, _, masked = look(rows)
        u = uniform(options.seed, row_ids[rows, None], position, ORDER)
        event[rows] = events(u, masked, options.sampler, options.steps, options.schedule)
        arrival[rows] = arrival_rate(
            u, event[rows], options.sampler, options.steps, options.schedule
        )

    open_blocks(everyone)
    while len(rows := progress.active_in(cache)):
        position, x, masked = look(rows)
        fix = at = next_positions(event[rows], masked)
        finished = uncached[rows] if bool(uncached[rows].any()) else None
        if finished is not None:
            before = (position - size).clamp(min=0)
            x = torch.cat([_read(canvas, rows, before, config.mask_token_id), x], dim=1)
            position = torch.cat([before, position], dim=1)
            at = torch.cat([torch.zeros_like(fix), fix], dim=1)
        sigma = total_noise(arrival[rows].masked_fill(~fix, 0).amax(-1)).float()
        logits = model.decode(x, position, cache, at, finished=finished, sigma=sigma)
        if finished is not None:
            cache.append_staged(finished.nonzero().squeeze(-1))
            uncached[rows] = False
        at_row, at_offset = fix.nonzero(as_tuple=True)
        fixed_rows, fixed_positions = rows[at_row], first[rows[at_row]] + at_offset
        canvas[fixed_rows, fixed_positions] = progress.draw(logits, fixed_rows, fixed_positions)
        step = progress.step(rows, fixed_rows, fixed_positions)
        if len(more := progress.active()) and len(done := more[~look(more)[2].any(-1)]):
            open_blocks(done)
        yield step


def _read(canvas: Tensor, rows: Tensor, position: Tensor, fill: int) -> Tensor:
    """canvas at `position` [n, K] of `rows` [n]; `fill` past its end."""
    inside = position < canvas.shape[1]
    x = canvas[rows[:, None], position.clamp(max=canvas.shape[1] - 1)]
    return torch.where(inside, x, fill)


def _autoregressive(
    model: Denoiser, canvas: Tensor, starts: Tensor, row_ids: Tensor, options: SamplingOptions
) -> Iterator[Step]:
    """AR: each evaluation feeds a row's last token and fixes the next one."""
    progress = Progress(model, canvas, starts, row_ids, options)
    cache = model.new_cache(len(canvas), min(model.config.length - 1, canvas.shape[1]), 1)
    everyone = torch.arange(len(canvas), device=canvas.device)
    last = starts - 1
    if int(last.max()) > 0:
        _prefill(model, cache, canvas, last, 1, model.config.length)
        yield progress.step(everyone[last > 0], everyone[:0], everyone[:0])
    while len(rows := progress.active_in(cache)):
        position = last[rows, None]
        x = canvas[rows[:, None], position]
        everywhere = torch.ones_like(x, dtype=torch.bool)
        logits = model.decode(x, position, cache, everywhere)
        cache.append_staged(torch.arange(len(rows), device=rows.device))
        last[rows] += 1
        canvas[rows, last[rows]] = progress.draw(logits, rows, last[rows])
        yield progress.step(rows, rows, last[rows])


def _prefill(
    model: Denoiser, cache: BlockCache, canvas: Tensor, counts: Tensor, block_size: int, window: int
) -> None:
    """Caches the first `counts` [B] tokens of each row, whole blocks, in one evaluation."""
    size = int(counts.max())
    context = model.encode(canvas[:, :size], BlockLayout(size, block_size, window))
    rows = torch.arange(len(canvas), device=canvas.device)
    cache.append(rows, torch.stack(context.keys), torch.stack(context.values), counts)


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    `tokens`: new ids of each row, EOS included. `finish`: "eos", "length", or "low_entropy" for a
    text that the rule of that name gave up.
    """

    tokens: list[list[int]]
    nfe: list[int]
    finish: list[str]
    seconds: float

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
        return sum(map(len, self.tokens)) / max(sum(self.nfe), 1)


def generate_tokens(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    rows: Sequence[int] | None = None,
) -> Generation:
    """The last item of `stream_tokens`, with its cost."""
    begin = time.perf_counter()
    *_, step = stream_tokens(model, prompts, options, rows)
    return collect(step, prompts, model.config.eos_token_id, time.perf_counter() - begin)


def collect(
    step: Step, prompts: Sequence[Sequence[int]], eos_token_id: int | None, seconds: float
) -> Generation:
    """The `Generation` a last step describes."""
    tokens = [
        step.tokens[row, len(prompt) : int(step.lengths[row])].tolist()
        for row, prompt in enumerate(prompts)
    ]
    finish = [
        "low_entropy" if given_up else "eos" if new and new[-1] == eos_token_id else "length"
        for new, given_up in zip(tokens, step.rejected.tolist(), strict=True)
    ]
    return Generation(tokens, step.nfe.tolist(), finish, seconds)
