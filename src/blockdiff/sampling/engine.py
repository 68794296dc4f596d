"""Generation block by block (algorithm 2 of the paper), for rows that come and go.

    for each block: start from masks; fix positions until none is masked, each step reading the
    cached clean blocks before it; the first of these steps also runs the block finished before,
    beside its own, and appends that one's keys and values

A row has options, an order, a block size and random numbers of its own: its tokens are the same
alone and in a batch, whenever it came and whatever the others do, in float32 (docs/precision.md).
What is known of the rows stays on the host: an evaluation waits for its device once, for the
tokens, and once more where an order first asks which positions the network unmasks.

Shapes: n rows of an evaluation, K block size, T columns of an evaluation, P positions whose logits
are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockdiff.cache import BlockCache
from blockdiff.categorical import Array
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import total_noise
from blockdiff.sampling.logprobs import note_logprobs
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.orders.base import Order, RowState, answered, asked
from blockdiff.sampling.rows import Rows
from blockdiff.sampling.step import Step
from blockdiff.sampling.twins import join, leaders, with_twins
from blockdiff.sampling.verifying import Verifier


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
        self.model, self.rows = model, Rows(model.config)
        self.cache = model.new_cache(0, 0, 1)
        self._verifier: Verifier | None = None  # of rows whose tokens are drafted and verified
        self.waits = 0  # how often the host waited for the device
        self._timed = model.config.time_conditioning
        # bool [V]: the mask token, and ids that stand for none
        self._no_token = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        self._no_token[model.config.mask_token_id :][:1] = True
        if model.drawable is not None:
            self._no_token |= ~model.drawable.cpu()
        self._no_token = self._no_token.to(model.device)

    @property
    def active(self) -> bool:
        """Whether some row is not finished."""
        return bool((self.rows.state["length"] < 0).any())

    def admit(
        self, prompt: Sequence[int], options: SamplingOptions, number: int | None = None
    ) -> int:
        """Adds a row and returns its name; it takes part from the next step on.

        `prompt`: token ids, at least one. `number`: the row's in the address of its random numbers,
        by default how many were admitted before. Raises `InputError` for an empty prompt, one with
        the mask token, ids that are not the model's, or options that do not fit the model.
        """
        return self.admit_all([prompt], options, None if number is None else [number])[0]

    def admit_all(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        numbers: Sequence[int] | None = None,
        after: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        """`admit` for many rows with the same options, in a fraction of the time.

        `after`: of each row the text that comes behind the new tokens, seen as far as it lies in
        the blocks that are being written; the mask token where it is unknown.
        """
        places = self.rows.admit(prompts, options, numbers, after)
        rows = self.rows.state[places]
        if self.rows.groups[rows["group"][0]][1].verifies:
            self._verifier = self._verifier or Verifier(self.model, self.rows, self._no_token)
            self._verifier.admit(places)
        else:
            self.cache.admit(places, rows["size"], rows["capacity"])
        names: list[int] = rows["name"][rows["name"] >= 0].tolist()
        return names

    @torch.inference_mode()
    def drop(self, name: int) -> None:
        """Forgets a row, finished or not; raises `InputError` where there is none of that name."""
        names = self.rows.state["name"]
        if name < 0 or name not in names:
            raise InputError(f"there is no row {name}; give what `admit` returned")
        for place in np.isin(names, [name, -1 - name]).nonzero()[0][::-1].tolist():
            self.rows.drop(place)
            if self._verifier is not None:
                self._verifier.drop(place)
            for cache in self._caches:
                cache.drop((cache.rows == place).nonzero()[0])
                cache.rows -= cache.rows > place

    @property
    def _caches(self) -> list[BlockCache]:
        return [self.cache] if self._verifier is None else [self.cache, self._verifier.cache]

    @torch.inference_mode()
    def step(self) -> Step:
        """One network evaluation: of the prompts that came since the last, else of all blocks.

        Rows that are drafted and verified have an evaluation of their own beside those of blocks.
        """
        state = self.rows.state
        busy = [cache for cache in self._caches if (state["length"][cache.rows] < 0).any()]
        if not busy:
            raise InputError("no row is left to go on with; admit one first")
        *before, last = (self._step(cache) for cache in busy)
        return last.after(*before)

    def _step(self, cache: BlockCache) -> Step:
        state = self.rows.state
        waiting = cache.rows[state["prompt"][cache.rows] > 0]
        if len(waiting):
            self._prefill(cache, waiting)
            return self.rows.step(waiting, *[waiting[:0]] * 4)
        if cache is self.cache:
            return self._step_blocks()
        assert self._verifier is not None
        rows, written, at = self._verifier.step()
        self.waits += self._verifier.waits
        step = self.rows.step(rows, written, at, np.zeros(len(at), bool), rows)
        cache.drop((state["length"][cache.rows] >= 0).nonzero()[0])
        return step

    def _step_blocks(self) -> Step:
        rows, state = self.cache.rows, self.rows.state
        leader = leaders(state["name"][rows])  # a twin does as its row does
        live = ((state["length"][rows] < 0) & (state["name"][rows] >= 0)).nonzero()[0]
        position, unfixed = self.rows.look(rows)
        unfixed = unfixed[leader]
        part = self.rows.part(rows, position, unfixed)
        if part is not unfixed:  # one that is full may be edited still, before the next
            part &= self.rows.new[rows, : part.shape[1]]
        masked = self.rows.first_alone(part)
        views = self.rows.views(rows, live, position, masked)
        wanted, rate = np.zeros_like(masked), np.zeros(len(rows))
        for place, order, view in views:
            asks, rate[place] = asked(order, view)
            wanted[place, : asks.shape[1]] = asks
        if self._timed and part is not unfixed:  # an order knows of no masks behind the part
            rate = np.where(state["part"][rows] > 0, unfixed.sum(1) / state["size"][rows], rate)
        logits, noised = self._evaluate(rows, position, wanted[leader], rate[leader])
        logits, own, wanted = join(logits, wanted[leader], leader, self.rows.scales(rows))
        state["evaluations"][rows[live]] += 1
        which, tokens = self._choose(logits, wanted, views)
        place, column = (index[which] for index in wanted.nonzero())
        note_logprobs(self.rows, own, (which,), tokens, rows[place], position[place, column])
        place, column, tokens = with_twins(leader, place, column, tokens)
        written, at, edited = rows[place], position[place, column], ~unfixed[place, column]
        self.rows.fix(written, at, tokens)
        self.rows.revised[written, column] |= edited
        done = state["uncached"][rows] > 0
        if self.rows.shifted:  # a block whose next token is not fixed yet is run again
            done &= np.isin(np.arange(len(rows)), place[column == 0])
        self._store(rows, done, noised)
        unfixed[place, column] = False
        changed = np.isin(np.arange(len(rows)), place)
        settled = self.rows.settled(rows, part & unfixed, changed)[leader]
        final = np.where(state["edits"][rows] > 0, settled, changed)[live]
        step = self.rows.step(rows[live], written, at, edited, rows[live][final])
        self.rows.require_end(rows)
        going = state["length"][rows] < 0
        over = going & settled & ~unfixed.any(1)
        if part is not unfixed:
            more = going & settled & ~over
            self.rows.begin_part(rows[more], position[more], unfixed[more])
        self.rows.move_on(rows[over])
        # A finished row is padding for graphs, until half are: each drop changes the shapes.
        if not self.model.graphs or 2 * going.sum() <= len(rows):
            self.cache.drop((~going).nonzero()[0])
        return step

    def _evaluate(
        self, rows: Array, position: Array, wanted: Array, rate: Array
    ) -> tuple[Tensor, int]:
        """Logits [P, V] of the wanted positions of the rows' blocks, float32, row by row.

        And how many columns of noised tokens were run, behind those of finished blocks.
        """
        state, shifted, device = self.rows.state[rows], self.rows.shifted, self.model.device
        finished = state["uncached"] > 0
        cached = finished | (self.model.graphs & (state["capacity"] > 0))
        clean = int(state["size"][cached].max(initial=0))
        # A first token, whose logits are the finished block's, needs no noised one.
        noised = position.shape[1] if not shifted or wanted[:, 1:].any() else 0
        # Finished blocks end, and noised ones begin, at column `clean`.
        before = np.maximum(state["first"][:, None] + np.arange(-clean, noised), 0)
        row, column = wanted.nonzero()
        at = row * before.shape[1] + column + clean - shifted
        x = torch.from_numpy(np.stack([self.rows.read(rows, before), before]))
        x = x.to(device, non_blocking=True)
        places = torch.from_numpy(at).to(device, non_blocking=True)
        sigma = total_noise(torch.from_numpy(rate)).float() if self._timed else None
        sigma = None if sigma is None else sigma.to(device, non_blocking=True)
        config = self.model.config
        mask = self.cache.visible(
            clean, noised, finished,
            clean_stream=config.clean_stream, inside_block=config.inside_block,
        )  # fmt: skip
        logits = self.model.decode(
            x[0], x[1], self.cache, places, mask=mask, clean=clean, sigma=sigma
        ).float()
        return logits.masked_fill_(self._no_token, -torch.inf), noised

    def _store(self, rows: Array, which: Array, noised: int) -> None:
        """Appends the staged blocks of those of `rows` for which bool [n] `which` is true."""
        if which.any():
            self.cache.append_staged(which.nonzero()[0], noised)
            self.rows.state["uncached"][rows[which]] = 0

    def _choose(
        self, logits: Tensor, wanted: Array, views: list[tuple[Array, Order, RowState]]
    ) -> tuple[Array, Array]:
        """Which wanted positions are fixed, by their place in the logits, and their tokens."""
        owner = wanted.nonzero()[0]
        indices, found = [], []
        for place, order, view in views:
            mine: Any = slice(None)
            own = logits
            if len(views) > 1:
                mine = np.isin(owner, place).nonzero()[0]
                own = logits[torch.from_numpy(mine).to(logits.device, non_blocking=True)]
            chosen, tokens = answered(order, own, wanted[place, : view.masked.shape[1]], view)
            if chosen is None and len(views) == 1:
                self.waits += 1
                return np.arange(len(owner)), tokens.cpu().numpy()
            if chosen is None:
                chosen = torch.ones_like(tokens, dtype=torch.bool)
            elif chosen.device != tokens.device:  # the order itself has waited for it
                self.waits += 1
            indices.append(np.arange(len(owner))[mine])
            chosen = chosen.to(tokens.device, torch.int64, non_blocking=True)
            found.append(torch.stack([chosen, tokens]))
        taken, drawn = torch.cat(found, 1).cpu().numpy()  # one wait for all
        self.waits += 1
        return np.concatenate(indices)[taken > 0], drawn[taken > 0]

    def _prefill(self, cache: BlockCache, rows: Array) -> None:
        """Caches the prompts' whole blocks, in one evaluation for each grid of blocks."""
        state, config = self.rows.state, self.model.config
        size = state["size"][rows]
        grids = np.stack([size, -state["first"][rows] % size], axis=1)
        for size, offset in np.unique(grids, axis=0).tolist():
            own = rows[(grids == (size, offset)).all(1)]
            counts = state["prompt"][own]
            longest = int(counts.max())
            # Behind a shorter prompt are masks, and a plain causal model's is no id that it knows.
            tokens = np.minimum(self.rows.canvas[own, :longest], config.vocab_size - 1)
            x_0 = torch.from_numpy(tokens).to(self.model.device, non_blocking=True)
            layout = config.layout_of(
                longest, size, window=config.length if config.slides else None, offset=offset
            )
            context = self.model.encode(x_0, layout)
            places = np.array([(cache.rows == row).nonzero()[0][0] for row in own])
            cache.append(places, context.keys, context.values, counts)
        state["prompt"][rows] = 0
