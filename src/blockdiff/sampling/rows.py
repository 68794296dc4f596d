"""Rows of text that are being written, as the host knows them.

Three kinds of row differ in where their blocks lie, and in nothing else:

    block diffusion  the block at a multiple of K, after C = L − K cached tokens
    AR               K = 1; the logits of a token are those of the next, so the cached block gives
                     them, and the masked one is never run
    K = L            nothing is cached; the window moves on by half of itself (MDLM, SEDD)

Shapes: B rows, n of them, S canvas length, K block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch

from blockdiff.categorical import Array, host_uniform, signed
from blockdiff.checks import whole_number
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Conventions
from blockdiff.registry import ORDERS
from blockdiff.sampling.constraints import Automaton, follow
from blockdiff.sampling.fitting import check_options, check_prompt
from blockdiff.sampling.guides import Guides
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.orders.base import ORDER, Order, RowState, sample_tokens
from blockdiff.sampling.step import Step
from blockdiff.sampling.stopping import StoppingRule, rules_of
from blockdiff.sampling.twins import leaders, prompt_of_twin

# name: what `admit` called it, −1 − that of its row where it is a twin. number, seed: its part of
# the address of random numbers. group: that of rows with equal options. start, end: where its text
# begins and ends. known: tokens before the first masked one. first: where its block begins. size:
# K. stride: from one block to the next. part: so many of its positions are fixed before the next
# are looked at; 0 for all alike. limit: up to which position blocks are filled. capacity: C.
# prompt: tokens of it still to be cached. uncached: whether the block before its own is.
# evaluations: those of its block. nfe: all. rejected: whether a rule gave it up. stopped: whether
# one, or its constraint, ended it. edits: whether its order does. length: −1 until finished.
_FIELDS = (
    "name number seed group start end known first size stride part limit capacity prompt uncached "
    "evaluations nfe rejected stopped edits length"
)
# A block in which something is masked still, this many evaluations beyond its positions and steps,
# has an order that does not end.
PATIENCE = 1000
_STATE = np.dtype([(field, np.int64) for field in _FIELDS.split()])


class Rows:
    """`state` [B]: the fields above. `canvas` int64 [B, S]: prompt, text, and masks."""

    def __init__(self, config: Conventions) -> None:
        self.config, self.mask_token_id = config, config.mask_token_id
        # 1 where the logits of a token are those of the next (AR, "shift"), else 0
        self.shifted = int(config.prediction == "shift")
        self.state, self.canvas = np.empty(0, _STATE), np.empty((0, 0), np.int64)
        self.u = np.empty((0, 0))  # of each row, the uniform numbers of its block
        self.logprobs: Array | None = None  # [B, S], once a row wants them
        self.new = np.empty((0, 0), bool)  # what was masked as it, or its part, began
        self.revised = np.empty((0, 0), bool)  # and what was written over since
        self.groups: list[tuple[SamplingOptions, Order, list[StoppingRule]]] = []
        self.guides: list[Guides] = []  # of each group
        self.automata: list[Automaton | None] = []  # of each row, where its constraint stands
        self.admitted = 0

    def admit(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        numbers: Sequence[int] | None,
        after: Sequence[Sequence[int]] | None = None,
        twins: Array | None = None,
    ) -> Array:
        """Adds a row for each prompt, and its twin; their places, which are the last.

        `after`: of each row the text behind what is written; the mask token where that is unknown.
        `twins`: names of such rows that are twins of others.
        """
        if not isinstance(options, SamplingOptions):
            raise InputError(f"`options` is {type(options).__name__}; give a SamplingOptions")
        config, order = self.config, ORDERS.find(options.sampler, "sampler")
        names: Array = self.admitted + np.arange(len(prompts)) if twins is None else twins
        if numbers is not None:
            numbers = [whole_number("number", number, 0) for number in numbers]
        sizes: Any = check_options(config, options, order)
        size, part = sizes
        behind = np.array([len(one) for one in after or ()] or [0] * len(prompts))
        others: list[list[int]] = []
        if twins is None:
            for prompt, tail in zip(prompts, behind.tolist(), strict=True):
                check_prompt(config, prompt, options, tail)
            if options.cfg_scale:
                others = [prompt_of_twin(config, prompt, size) for prompt in prompts]
        rows, places = np.zeros(len(prompts), _STATE), len(self.state) + np.arange(len(prompts))
        start = np.array([len(prompt) for prompt in prompts])
        end = start + options.max_new_tokens
        grid = start if config.prompt_grid == "prompt_end" else 0  # where a block begins
        cached = config.length > size
        if not (cached or config.slides):
            # One block, as long as the text, which may not outgrow the context.
            grid, size = 0, end + behind
        whole = end + (grid - end) % size
        stride = size if cached else np.maximum(size // 2, 1)
        first = grid + (start - grid) // stride * stride
        if not cached:
            first = np.maximum(first + stride - size, 0) * config.slides  # with what fits before
        rows["name"], rows["number"] = names, names if numbers is None else numbers
        rows["seed"], rows["group"] = signed(options.seed), self._group(options, order)
        rows["start"], rows["end"], rows["known"] = start, end, start
        rows["first"], rows["size"], rows["stride"] = first, size, stride
        rows["part"] = part
        rows["capacity"] = np.minimum(config.length - size, whole) * cached
        # Blocks are filled whole; a window only as far as text is wanted, by most orders.
        fills = (cached or order.fills_block) and after is None
        rows["limit"] = whole if fills else end
        # Where logits are the next token's, the first token of a block is read off the block
        # before, which is run once more: of AR the last token.
        again = (self.shifted | order.verifies) & cached & (first == start)
        rows["prompt"] = first - size * again if cached else 0
        guides = self.guides[rows["group"][0]]
        rows["edits"] = order.edits and not guides.in_order
        rows["uncached"], rows["length"] = again, -1
        constraint = guides.constraint
        self.automata += [constraint.begin() if constraint else None for _ in prompts]
        self.admitted += len(prompts) * (twins is None)
        self.state = np.append(self.state, rows)
        width = int(np.maximum(whole, end + behind).max())
        self.canvas = _grown(self.canvas, len(prompts), width, self.mask_token_id)
        for place, prompt in zip(places, prompts, strict=True):
            self.canvas[place, : len(prompt)] = prompt
        for place, begin, tail in zip(places, end.tolist(), after or (), strict=False):
            self.canvas[place, begin : begin + len(tail)] = tail
        self.u = _grown(self.u, len(prompts), int(rows["size"].max()), 0.0)
        if options.logprobs and self.logprobs is None:
            self.logprobs = np.empty((0, 0))
        if self.logprobs is not None:
            more = len(self.state) - len(self.logprobs)
            self.logprobs = _grown(self.logprobs, more, self.canvas.shape[1], np.nan)
        self.new = _grown(self.new, len(prompts), self.u.shape[1], False)
        self.revised = _grown(self.revised, len(prompts), self.u.shape[1], False)
        self._begin(places, *self.look(places))
        if others:
            twins = self.admit(others, options, rows["number"].tolist(), after, -1 - names)
            return np.append(places, twins)
        return places

    def drop(self, place: int) -> None:
        """Forgets a row; those behind it move up."""
        self.state = np.delete(self.state, place)
        del self.automata[place]
        self.canvas, self.u = np.delete(self.canvas, place, 0), np.delete(self.u, place, 0)
        if self.logprobs is not None:
            self.logprobs = np.delete(self.logprobs, place, 0)
        self.new, self.revised = np.delete(self.new, place, 0), np.delete(self.revised, place, 0)

    def _group(self, options: SamplingOptions, order: Order) -> int:
        shared = replace(options, seed=0, max_new_tokens=1)  # what no order asks for
        for number, (known, *_) in enumerate(self.groups):
            if known == shared:
                return number
        # A number that no row has any more is given again.
        number = next(n for n in range(len(self.groups) + 1) if n not in self.state["group"])
        self.groups[number : number + 1] = [(shared, order, rules_of(options.stop))]
        self.guides[number : number + 1] = [Guides.of(options)]
        return number

    def scales(self, rows: Array) -> Array:
        """float64 [n]: how strongly each row is guided by its twin."""
        # An option that is left out is NaN to numpy.
        found = np.nan_to_num(np.array([o.cfg_scale for o, *_ in self.groups], np.float64))
        return found[self.state["group"][rows]]

    def look(self, rows: Array) -> tuple[Array, Array]:
        """Positions [n, K] of the rows' blocks, and which of them are still to be fixed."""
        state = self.state[rows]
        column = np.arange(state["size"].max())
        position = state["first"][:, None] + column
        inside = (column < state["size"][:, None]) & (position < state["limit"][:, None])
        return position, inside & (self.read(rows, position) == self.mask_token_id)

    def part(self, rows: Array, position: Array, unfixed: Array) -> Array:
        """Of `unfixed` bool [n, K] those of the part of its block that each row is at.

        Parts are counted from the block's beginning, in whole-text attention from the prompt's end.
        """
        state = self.state[rows]
        if not state["part"].any():
            return unfixed
        begin = np.where(state["capacity"] > 0, state["first"], state["start"])[:, None]
        number = (position - begin) // np.maximum(state["part"], 1)[:, None]
        number *= state["part"][:, None] > 0
        now = np.where(unfixed, number, number.max()).min(1, keepdims=True)
        here: Array = unfixed & (number == now)
        return here

    def first_alone(self, masked: Array) -> Array:
        """Of `masked` bool [n, K] what comes next: the first of a block, where it comes alone."""
        if not self.shifted:
            return masked
        alone = masked.copy()
        alone[masked[:, 0], 1:] = False
        return alone

    def read(self, rows: Array, position: Array) -> Array:
        """The canvas at `position` [n, K]; the mask token past its end."""
        inside = position < self.canvas.shape[1]
        found = self.canvas[rows[:, None], np.where(inside, position, 0)]
        return np.where(inside, found, self.mask_token_id)

    def revisable(self, rows: Array, tokens: Array) -> Array:
        """bool [n, K]: which of the `tokens` of the rows' blocks an order may write over."""
        size = tokens.shape[1]
        found: Array = self.new[rows, :size] > self.revised[rows, :size]
        found[tokens == self.mask_token_id] = False
        found[:, : self.shifted] = False  # what the clean stream gave
        return found

    def settled(self, rows: Array, masked: Array, changed: Array) -> Array:
        """bool [n]: whose blocks are final, in which `masked` [n, K] is left.

        `changed` bool [n]: which of them the evaluation wrote to.
        """
        found: Array = np.logical_not(masked.any(1))
        again = (found & changed & (self.state["edits"][rows] > 0)).nonzero()[0]
        if len(again):
            row = rows[again]
            column = self.state["first"][row][:, None] + np.arange(masked.shape[1])
            found[again] = ~self.revisable(row, self.read(row, column)).any(1)
        return found

    def fix(self, rows: Array, positions: Array, tokens: Array) -> None:
        """Writes tokens [n]; raises `InputError` for the mask token or one there is not."""
        wrong = (tokens < 0) | (tokens >= self.config.vocab_size) | (tokens == self.mask_token_id)
        if wrong.any():
            order = self.groups[self.state["group"][rows[wrong][0]]][1]
            raise InputError(
                f"the order {order.name} fixed a position with {tokens[wrong][0]}, which is no "
                "token; `draw` gives those there are"
            )
        self.canvas[rows, positions] = tokens

    def move_on(self, rows: Array) -> None:
        """From the blocks of `rows`, which are full, to their next with something to fix."""
        while len(rows):
            self.state["first"][rows] += self.state["stride"][rows]
            self.state["uncached"][rows] = self.state["capacity"][rows] > 0
            self.state["evaluations"][rows] = 0
            if self.config.causal:
                return  # the next token is masked: the row goes on
            position, unfixed = self.look(rows)
            full = ~unfixed.any(1)
            self._begin(rows[~full], position[~full], unfixed[~full])
            rows = rows[full]

    def begin_part(self, rows: Array, position: Array, unfixed: Array) -> None:
        """Notes what is masked of the part of its block that each row is at, all as in `part`."""
        self.state["evaluations"][rows] = 0
        self.new[rows, : unfixed.shape[1]] = self.part(rows, position, unfixed)

    def _begin(self, rows: Array, position: Array, unfixed: Array) -> None:
        """The same of new blocks, whose uniform numbers are drawn where they are read."""
        self.begin_part(rows, position, unfixed)
        self.revised[rows] = False
        if not self.config.time_conditioning:
            rows = rows[self.state["size"][rows] > 1]  # a block of one has no order
        if len(rows):
            state = self.state[rows][:, None]
            position = state["first"] + np.arange(state["size"].max())
            u = host_uniform(state["seed"], state["number"], position, ORDER)
            self.u[rows, : u.shape[1]] = u

    def views(
        self, rows: Array, live: Array, position: Array, masked: Array
    ) -> list[tuple[Array, Order, RowState]]:
        """The rows of one group: their places among `rows`, their order, and what it sees.

        `live`: the places of those that go on.
        """
        group = self.state["group"][rows[live]]
        found = []
        for number in np.unique(group).tolist():
            place = live[group == number]
            row, (options, order, _) = rows[place], self.groups[number]
            size = self.state["size"][row].max()
            # A block's first token that comes alone is no part of what an order plans.
            alone = self.shifted & self.new[row, 0]
            block = (self.state["capacity"][row] > 0) & (self.state["part"][row] == 0)
            began = self.new[row].sum(1) - alone
            whole = np.where(block, self.state["size"][row] - self.shifted, began)
            view = RowState(
                masked=masked[place, :size],
                planned=whole,
                u=self.u[row, :size],
                evaluations=self.state["evaluations"][row] - (alone & ~masked[place, 0]),
                positions=position[place, :size],
                numbers=self.state["number"][row],
                seeds=self.state["seed"][row],
                options=options,
                sample=partial(sample_tokens, options),
                remainder=self.config.remainder,
            )
            if order.edits:
                tokens = self.read(row, view.positions)
                view = replace(view, tokens=tokens, revisable=self.revisable(row, tokens))
            if self.guides[number]:
                known, automata = self.state["known"][row], [self.automata[one] for one in row]
                new = self.new[row, self.shifted : size]  # a first token alone has no order
                view = view.guided(
                    self.guides[number], self.canvas[row], known, new, automata, self.mask_token_id
                )
            found.append((place, order, view))
        return found

    def require_end(self, rows: Array) -> None:
        """Raises `InputError` for an order that evaluates a block of `rows` without end."""
        state = self.state[rows]
        longest = state["size"] * (1 + state["edits"]) + PATIENCE
        for row, most in zip(state, longest.tolist(), strict=True):
            if row["evaluations"] <= most:
                continue
            options, order, _ = self.groups[row["group"]]
            if row["evaluations"] > most + (0 if options.steps is None else options.steps):
                raise InputError(
                    f"the order {order.name} has not fixed a block of {row['size']} after "
                    f"{row['evaluations']} evaluations: sooner or later `choose` must fix each "
                    "position"
                )

    def finish(self, row: int) -> None:
        """Ends a row whose text is all fixed, or which a rule ends."""
        state = self.state[row]
        known, start, end = int(state["known"]), int(state["start"]), int(state["end"])
        masked = (self.canvas[row, known:end] == self.mask_token_id).nonzero()[0]
        now = known + int(masked[0]) if len(masked) else end
        self.state["known"][row] = now
        found = []
        for rule in self.groups[state["group"]][2]:
            if rule.rejects and now == end:
                continue
            length = rule.length(self.canvas[row, :now], known, start, self.config.eos_token_id)
            if length is not None:
                if isinstance(length, bool) or not isinstance(length, Integral):
                    length = -1  # not a length
                if not start <= length <= now:
                    raise InputError(
                        f"the stopping rule {rule.name}: `length` must give None, or a whole "
                        f"number from {start}, the prompt's, to {now}, the text's so far"
                    )
                found.append((int(length), rule.rejects))
        automaton = self.automata[row]
        if automaton is not None:
            length = follow(automaton, self.canvas[row, known:now].tolist())
            found += [] if length is None else [(known + length, False)]
        if found:  # the first end there is
            self.state["length"][row], self.state["rejected"][row] = min(found)
            self.state["stopped"][row] = 1
            return
        if now == end:
            self.state["length"][row] = end

    def step(
        self, rows: Array, written: Array, positions: Array, edited: Array, final: Array
    ) -> Step:
        """Counts an evaluation of `rows`, sees which are finished, and reports.

        `written` [n]: the row of each position that was written to; `edited` bool [n]: whether a
        token was there before. `final`: rows of which nothing so far will be written over.
        """
        self.state["nfe"][rows] += 1
        changed = np.zeros((2, *self.canvas.shape), bool)
        changed[edited.astype(np.int64), written, positions] = True
        for row in final.tolist():
            self.finish(row)
        state, found = self.state, [self.canvas.copy(), changed[0]]
        state["length"] = state["length"][leaders(state["name"])]
        found += [state["nfe"].copy(), state["length"].copy(), state["rejected"] > 0]
        step = Step(*map(torch.from_numpy, [*found, state["name"].copy()]))
        if self.logprobs is not None:
            step = replace(step, logprobs=torch.from_numpy(self.logprobs.copy()))
        if state["edits"].any():
            settled = torch.from_numpy(state["known"].copy())
            step = replace(step, edited=torch.from_numpy(changed[1]), settled=settled)
        step = replace(step, stopped=torch.from_numpy(state["stopped"] > 0))
        shown = state["name"] >= 0
        return step if shown.all() else step.of(torch.from_numpy(shown))


def _grown(table: Array, rows: int, width: int, fill: float) -> Array:
    """The table [B, W] with more `rows`, and at least `width` wide."""
    grown = np.full((len(table) + rows, max(width, table.shape[1])), fill, table.dtype)
    grown[: len(table), : table.shape[1]] = table
    return grown
