"""Generation block by block (algorithm 2 of the paper), for rows that come and go.

    for each block: start from masks; fix positions until none is masked, each step reading the
    cached clean blocks before it; the first of these steps also runs the block finished before,
    beside its own, and appends that one's keys and values

A row has options, an order, a block size and random numbers of its own: its tokens are the same
alone and in a batch, whenever it came and whatever the others do, in float32 (docs/precision.md).
Three kinds of row differ in where their blocks lie, and in nothing else:

    block diffusion  the block at a multiple of K, after C = L − K cached tokens
    AR               K = 1; the logits of a token are those of the next, so the cached block gives
                     them, and the masked one is never run
    K = L            nothing is cached; the window moves on by half of itself (MDLM, SEDD)

What is known of the rows stays on the host: an evaluation waits for its device once, for the
tokens, and once more where an order first asks which positions the network is sure of.

Shapes: B rows, n rows of an evaluation, S canvas length, K block size, T columns of an evaluation,
P positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockdiff.categorical import draw, real_dtype, signed, uniform
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import total_noise
from blockdiff.registry import ORDERS
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.orders.base import ORDER, TOKEN, Order, RowState
from blockdiff.sampling.step import Step
from blockdiff.sampling.stopping import StoppingRule, rules_of

Array = NDArray[Any]


class Engine:
    """Rows are admitted, each `step` is one network evaluation of all that go on.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> engine = blockdiff.Engine(model)
        >>> first = engine.admit([1, 2, 3], blockdiff.SamplingOptions(max_new_tokens=4))
        >>> step = engine.step()
        >>> later = engine.admit([5], blockdiff.SamplingOptions(max_new_tokens=2, block_size=4))
        >>> while engine.active:
        ...     step = engine.step()
        >>> step.rows.tolist() == [first, later], step.done.tolist()
        (True, [True, True])
        >>> engine.drop(first)
    """

    def __init__(self, model: Denoiser) -> None:
        """`model` should be in `eval` mode."""
        self.model, self.config = model, model.config
        self.canvas = np.empty((0, 0), np.int64)
        # Of each row: its name, its number and seed in the address of random numbers, its group of
        # equal options, and where its text begins and ends; `limit`: up to which position its block
        # is filled; `known`: tokens before the first masked one; `first`: where its block begins;
        # `prompt`: tokens of it still to be cached; `uncached`: whether the block before its own
        # is; `length`: −1 until it is finished; `evaluations`: those of its block.
        self.state = np.empty(0, [(name, np.int64) for name in (
            "name", "number", "seed", "group", "start", "end", "limit", "known", "first", "size",
            "stride", "capacity", "prompt", "uncached", "evaluations", "nfe", "rejected", "length",
        )])  # fmt: skip
        self.u = np.empty((0, 0))  # of each row, the uniform numbers of its block
        self.groups: list[tuple[SamplingOptions, Order, list[StoppingRule]]] = []
        self.cache = model.new_cache(0, 0, 1)
        self.waits = 0  # how often the host waited for the device
        self._names = 0
        drawable = model.drawable
        self._no_token = None if drawable is None else ~drawable.to(model.device)

    @property
    def active(self) -> bool:
        """Whether some row is not finished."""
        return bool((self.state["length"] < 0).any())

    def admit(
        self, prompt: Sequence[int], options: SamplingOptions, number: int | None = None
    ) -> int:
        """Adds a row and returns its name; it takes part from the next step on.

        `prompt`: token ids, at least one. `number`: the row's in the address of its random numbers,
        by default how many were admitted before. Raises `InputError` for an empty prompt, one with
        the mask token, ids that are not the model's, or options that do not fit the model.
        """
        config, order = self.config, ORDERS.find(options.sampler, "sampler")
        check_row(config, prompt, options, order)
        size = config.block_size if options.block_size is None else options.block_size
        start, end = len(prompt), len(prompt) + options.max_new_tokens
        width = end + -end % size
        capacity = min(config.length - size, width)
        stride = size if capacity else max(size // 2, 1)
        first = start // stride * stride
        if not capacity:
            first = max(first + stride - size, 0)  # with as much before it as fits
        # Blocks are sampled whole; a window only as far as text is wanted, by most orders.
        limit = end if not capacity and not order.fills_block else end + -end % size
        canvas, u = self.canvas, self.u
        shape = len(canvas) + 1, max(width, canvas.shape[1])
        self.canvas = np.full(shape, config.mask_token_id)
        self.canvas[:-1, : canvas.shape[1]] = canvas
        self.canvas[-1, :start] = prompt
        self.u = np.zeros((len(u) + 1, max(size, u.shape[1])))
        self.u[:-1, : u.shape[1]] = u
        row = np.zeros(1, self.state.dtype)
        row["name"], self._names = self._names, self._names + 1
        row["number"] = row["name"] if number is None else number
        row["seed"], row["group"] = signed(options.seed), self._group(options, order)
        row["start"], row["end"], row["limit"], row["known"] = start, end, limit, start
        row["first"], row["size"], row["stride"], row["capacity"] = first, size, stride, capacity
        # AR caches all tokens but the last, whose logits are the next token's.
        row["prompt"] = first - self._shifted if capacity else 0
        row["uncached"], row["length"] = self._shifted, -1
        self.state = np.append(self.state, row)
        place = np.array([len(self.state) - 1])
        self.cache.admit(place, np.array([size]), np.array([capacity]))
        self._open(place)
        return int(row["name"][0])

    def _group(self, options: SamplingOptions, order: Order) -> int:
        """The number of the rows that have these options."""
        for number, (known, *_) in enumerate(self.groups):
            if known == options:
                return number
        self.groups.append((options, order, rules_of(options.stop)))
        return len(self.groups) - 1

    def drop(self, name: int) -> None:
        """Forgets a row, finished or not; raises `InputError` where there is none of that name."""
        (place,) = (self.state["name"] == name).nonzero()
        if not len(place):
            raise InputError(f"there is no row {name}; give what `admit` returned")
        self.cache.drop((self.cache.rows == place[0]).nonzero()[0])
        self.cache.rows -= self.cache.rows > place[0]
        self.state = np.delete(self.state, place[0])
        self.canvas = np.delete(self.canvas, place[0], 0)
        self.u = np.delete(self.u, place[0], 0)

    @property
    def _shifted(self) -> int:
        """1 where the logits of a token are those of the next (AR), else 0."""
        return int(self.config.prediction == "shift")

    @torch.inference_mode()
    def step(self) -> Step:
        """One network evaluation: of the prompts that came since the last, else of all blocks."""
        waiting = self.cache.rows[self.state["prompt"][self.cache.rows] > 0]
        if len(waiting):
            self._prefill(waiting)
            return self._step(waiting, waiting[:0], waiting[:0])
        rows = self.cache.rows
        if not len(rows):
            raise InputError("no row is left to go on with; admit one first")
        position, masked = self._look(rows)
        groups = self._groups(rows, position, masked)
        wanted = np.zeros_like(masked)
        rate = np.zeros(len(rows)) if self.config.time_conditioning else None
        for place, order, view in groups:
            own = order.wanted(view)
            wanted[place, : own.shape[1]] = own
            if rate is not None:
                rate[place] = order.mask_rate(view, own)
        logits = self._evaluate(rows, position, wanted, rate)
        self.state["evaluations"][rows] += 1
        row, column = self._choose(logits, wanted, groups)
        fixed_rows, fixed_positions = rows[row], position[row, column]
        step = self._step(rows, fixed_rows, fixed_positions)
        self._open(self.cache.rows)
        return step

    def _look(self, rows: Array) -> tuple[Array, Array]:
        """Positions [n, K] of the rows' blocks, and which of them are still to be fixed."""
        state = self.state[rows]
        column = np.arange(state["size"].max())
        position = state["first"][:, None] + column
        inside = (column < state["size"][:, None]) & (position < state["limit"][:, None])
        return position, inside & (self._read(rows, position) == self.config.mask_token_id)

    def _read(self, rows: Array, position: Array) -> Array:
        """The canvas at `position` [n, K]; the mask token past its end."""
        inside = position < self.canvas.shape[1]
        found = self.canvas[rows[:, None], np.where(inside, position, 0)]
        return np.where(inside, found, self.config.mask_token_id)

    def _open(self, rows: Array) -> None:
        """Moves on from the blocks of `rows` in which nothing is left to fix."""
        while len(rows):
            position, masked = self._look(rows)
            complete = ~masked.any(1)
            state = self.state[rows]
            new = ~complete & (state["evaluations"] == 0) & (state["size"] > 1)
            if new.any():
                seed, number = (torch.from_numpy(state[name][new]) for name in ("seed", "number"))
                at = torch.from_numpy(position[new])
                u = uniform(seed[:, None], number[:, None], at, ORDER)
                self.u[rows[new], : at.shape[1]] = u.numpy()
            rows = rows[complete]
            self.state["first"][rows] += self.state["stride"][rows]
            self.state["uncached"][rows] = self._shifted | (self.state["capacity"][rows] > 0)
            self.state["evaluations"][rows] = 0

    def _groups(
        self, rows: Array, position: Array, masked: Array
    ) -> list[tuple[Array, Order, RowState]]:
        """The rows of equal options: their places among `rows`, their order, and what it sees."""
        found = []
        for number in np.unique(self.state["group"][rows]):
            place = (self.state["group"][rows] == number).nonzero()[0]
            row, (options, order, _) = rows[place], self.groups[number]
            size = self.state["size"][row[0]]
            view = RowState(
                masked=masked[place, :size],
                u=self.u[row, :size],
                evaluations=self.state["evaluations"][row],
                positions=position[place, :size],
                numbers=self.state["number"][row],
                options=options,
                sample=partial(_sample, options),
            )
            found.append((place, order, view))
        return found

    def _evaluate(self, rows: Array, position: Array, wanted: Array, rate: Array | None) -> Tensor:
        """Logits [P, V] of the wanted positions of the rows' blocks, float32, row by row."""
        state, mask_token_id = self.state[rows], self.config.mask_token_id
        finished = state["uncached"] > 0
        clean = int(state["size"][finished].max(initial=0))
        noised = 0 if self._shifted else position.shape[1]
        # Columns: finished blocks, which end where the noised ones begin.
        column = np.arange(-clean, noised)
        before = np.maximum(state["first"][:, None] + column, 0)
        x = self._read(rows, before)
        at = np.zeros(x.shape, bool)
        at[:, clean - self._shifted : clean - self._shifted + wanted.shape[1]] = wanted
        device = self.model.device
        moved = torch.from_numpy(np.stack([x, before])).to(device, non_blocking=True)
        sigma = None if rate is None else total_noise(torch.from_numpy(rate)).float().to(device)
        logits = self.model.decode(
            moved[0], moved[1], self.cache, torch.from_numpy(at.ravel().nonzero()[0]).to(device),
            mask=self.cache.visible(clean, noised, finished), clean=clean, sigma=sigma,
        ).float()  # fmt: skip
        if clean:
            self.cache.append_staged(finished.nonzero()[0], noised)
            self.state["uncached"][rows] = 0
        logits[:, mask_token_id] = -torch.inf
        if self._no_token is not None:
            logits.masked_fill_(self._no_token, -torch.inf)
        return logits

    def _choose(
        self, logits: Tensor, wanted: Array, groups: list[tuple[Array, Order, RowState]]
    ) -> tuple[Array, Array]:
        """Fixes tokens on the canvas; the places among the rows and columns of what is fixed."""
        owner, where = wanted.nonzero()
        taken, tokens = np.ones(len(owner), bool), np.zeros(len(owner), np.int64)
        for place, order, view in groups:
            mine = slice(None) if len(groups) == 1 else np.isin(owner, place)
            own = logits if len(groups) == 1 else logits[torch.from_numpy(mine).to(logits.device)]
            part = wanted[place, : view.masked.shape[1]]
            chosen, found = order.choose(own, part, view)
            if chosen is not None and chosen.device == found.device:
                found = torch.stack([found, chosen.long()])  # one wait for both
            self.waits += 1 + (chosen is not None and found.dim() == 1)
            on_host = found.cpu().numpy()
            if chosen is not None:
                taken[mine] = on_host[1] if on_host.ndim == 2 else chosen.numpy()
            tokens[mine] = on_host[0] if on_host.ndim == 2 else on_host
        owner, where = owner[taken], where[taken]
        rows = self.cache.rows[owner]
        self.canvas[rows, self.state["first"][rows] + where] = tokens[taken]
        return owner, where

    def _prefill(self, rows: Array) -> None:
        """Caches the prompts' whole blocks in one evaluation for each block size."""
        state, cache = self.state[rows], self.cache
        for size in np.unique(state["size"]):
            own = rows[state["size"] == size]
            counts = self.state["prompt"][own]
            longest = int(counts.max())
            x_0 = torch.from_numpy(self.canvas[own, :longest]).to(self.model.device)
            layout = BlockLayout(longest, int(size), self.config.length)
            context = self.model.encode(x_0, layout)
            place = np.array([(cache.rows == row).nonzero()[0][0] for row in own])
            cache.append(place, context.keys, context.values, counts)
        self.state["prompt"][rows] = 0

    def _step(self, rows: Array, fixed_rows: Array, fixed_positions: Array) -> Step:
        """Counts an evaluation of `rows`, sees which are finished, and reports."""
        self.state["nfe"][rows] += 1
        fixed = np.zeros_like(self.canvas, dtype=bool)
        fixed[fixed_rows, fixed_positions] = True
        for row in np.unique(fixed_rows).tolist():
            self._finish(row)
        done = (self.state["length"][self.cache.rows] >= 0).nonzero()[0]
        if len(done):
            self.cache.drop(done)
        state = self.state
        return Step(
            torch.from_numpy(self.canvas.copy()),
            torch.from_numpy(fixed),
            nfe=torch.from_numpy(state["nfe"].copy()),
            lengths=torch.from_numpy(state["length"].copy()),
            rejected=torch.from_numpy(state["rejected"] > 0),
            rows=torch.from_numpy(state["name"].copy()),
        )

    def _finish(self, row: int) -> None:
        """Ends a row whose text is all fixed, or which a rule ends."""
        known, start, end = (int(self.state[name][row]) for name in ("known", "start", "end"))
        open_ = (self.canvas[row, known:end] == self.config.mask_token_id).nonzero()[0]
        now = known + int(open_[0]) if len(open_) else end
        self.state["known"][row] = now
        text = self.canvas[row, :now]
        for rule in self.groups[self.state["group"][row]][2]:
            if rule.rejects and now == end:
                continue
            length = rule.length(text, known, start, self.config.eos_token_id)
            if length is not None:
                self.state["length"][row], self.state["rejected"][row] = length, rule.rejects
                return
        if now == end:
            self.state["length"][row] = end


def _sample(options: SamplingOptions, logits: Tensor, numbers: Array, positions: Array) -> Tensor:
    """A token for each row of logits [P, V]; its random number is that of row and position."""
    number, position = torch.from_numpy(numbers), torch.from_numpy(positions)

    def uniforms(which: Tensor, attempt: int) -> Tensor:
        if attempt == 0:  # everyone
            first = uniform(options.seed, number, position, TOKEN)
            return first.to(logits.device, real_dtype(logits.device))
        return uniform(options.seed, number[which], position[which], TOKEN + attempt)

    return draw(
        logits,
        uniforms,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        top_p_rule=options.top_p_rule,
    )


def check_row(config: Any, prompt: Sequence[int], options: SamplingOptions, order: Order) -> None:
    """Raises `InputError` for a prompt or options that do not fit the model."""
    if order.only not in (None, config.kind):
        raise InputError(
            f"the {order.name} sampler reads the scores of {str(order.only).upper()}, and this is "
            f"{config.kind}: use first_hitting or ancestral"
        )
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
        longest = len(prompt) + options.max_new_tokens
        if longest > config.length or options.block_size not in (None, config.length):
            raise InputError(
                f"SEDD writes within its context of {config.length} tokens, in one block; prompt "
                f"and new tokens come to {longest}: lower `max_new_tokens`"
            )
