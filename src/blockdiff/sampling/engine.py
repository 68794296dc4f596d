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
from blockdiff.sampling.apart import View, each
from blockdiff.sampling.logprobs import note_logprobs
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.orders.base import Order, RowState, answered, asked
from blockdiff.sampling.prefill import Prefixes, prefill
from blockdiff.sampling.recorded import decoder
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

    def __init__(
        self, model: Denoiser, *, isolate: bool = False, prefixes: Prefixes | None = None
    ) -> None:
        """`model` should be in `eval` mode. `prefixes`: beginnings of texts that are known.

        `isolate`: a row whose order, guides, rules or constraint raise, or give what is no token,
        is finished and in `failed`, by name; the others go on. Without it `step` raises.
        """
        self.model, self.rows = model, Rows(model.config, isolate)
        self.cache, self.prefixes = model.new_cache(0, 0, 1), prefixes
        self._decode = decoder(model, self.cache)
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

    @property
    def failed(self) -> dict[int, Exception]:
        """What ended those rows that could not go on, by name, until they are dropped."""
        return self.rows.failed or {}

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
            read = prefill(self.model, self.rows, cache, waiting, self.prefixes)
            if len(read):
                return self.rows.step(read, *[waiting[:0]] * 4)
        if cache is self.cache:
            step = self._step_blocks()
        else:
            assert self._verifier is not None
            rows, written, at = self._verifier.step()
            self.waits += self._verifier.waits
            step = self.rows.step(rows, written, at, np.zeros(len(at), bool), rows)
        over = state["length"][cache.rows] >= 0
        # A finished row is padding for graphs, until half are: each drop changes the shapes. Where
        # beginnings are kept, its own is, before somebody drops it.
        padding = cache is self.cache and cache.rounded and self.prefixes is None
        if not padding or 2 * over.sum() >= len(over):
            if self.prefixes is not None:
                self.prefixes.keep_finished(cache, self.rows, over.nonzero()[0])
            cache.drop(over.nonzero()[0])
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
        views, wanted, rate = [], np.zeros_like(masked), np.zeros(len(rows))
        given = self.rows.views(rows, live, position, masked)
        for one, asks in each(self.rows, rows, given, lambda _, order, view: asked(order, view)):
            views.append(one)
            wanted[one[0], : asks[0].shape[1]], rate[one[0]] = asks
        if not views:  # all have failed
            return self.rows.step(*[rows[:0]] * 5)
        if self._timed and part is not unfixed:  # an order knows of no masks behind the part
            rate = np.where(state["part"][rows] > 0, unfixed.sum(1) / state["size"][rows], rate)
        logits, noised = self._evaluate(rows, position, wanted[leader], rate[leader])
        logits, own, wanted = join(logits, wanted[leader], leader, self.rows.scales(rows))
        which, tokens = self._choose(rows, logits, wanted, views)
        place, column = (index[which] for index in wanted.nonzero())
        right = self.rows.are_tokens(rows[place], tokens)
        which, tokens, place, column = which[right], tokens[right], place[right], column[right]
        live = live[state["length"][rows[live]] < 0]  # those that did not fail
        state["evaluations"][rows[live]] += 1
        note_logprobs(self.rows, own, (which,), tokens, rows[place], position[place, column])
        place, column, tokens = with_twins(leader, place, column, tokens)
        written, at, edited = rows[place], position[place, column], ~unfixed[place, column]
        self.rows.canvas[written, at] = tokens
        self.rows.revised[written, column] |= edited
        done = state["uncached"][rows] > 0
        if self.rows.shifted:  # a block whose next token is not fixed yet is run again
            done &= np.isin(np.arange(len(rows)), place[column == 0])
        if done.any():
            self.cache.append_staged(done.nonzero()[0], noised)
            state["uncached"][rows[done]] = 0
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
        return step

    def _evaluate(
        self, rows: Array, position: Array, wanted: Array, rate: Array
    ) -> tuple[Tensor, int]:
        """Logits [P, V] of the wanted positions of the rows' blocks, float32, row by row.

        And how many columns of noised tokens were run, behind those of finished blocks.
        """
        state, shifted, device = self.rows.state[rows], self.rows.shifted, self.model.device
        finished = state["uncached"] > 0
        cached = finished | (self.cache.rounded & (state["capacity"] > 0))
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
        logits = self._decode(*x, self.cache, places, mask=mask, clean=clean, sigma=sigma).float()
        return logits.masked_fill_(self._no_token, -torch.inf), noised

    def _choose(
        self, rows: Array, logits: Tensor, wanted: Array, views: list[View]
    ) -> tuple[Array, Array]:
        """Which wanted positions are fixed, by their place in the logits, and their tokens."""
        owner = wanted.nonzero()[0]
        count = sum(len(place) for place, *_ in views)

        def ask(place: Array, order: Order, view: RowState) -> tuple[Any, Tensor | None, Tensor]:
            mine: Any = slice(None)
            own = logits
            if len(place) < count:
                mine = np.isin(owner, place).nonzero()[0]
                own = logits[torch.from_numpy(mine).to(logits.device, non_blocking=True)]
            elif self.rows.failed is not None and not order.__module__.startswith("blockdiff."):
                own = logits.clone()  # it may write into them, raise, and be asked again
            return mine, *answered(order, own, wanted[place, : view.masked.shape[1]], view)

        indices, found = [owner[:0]], [torch.empty(2, 0, dtype=torch.int64, device=logits.device)]
        for _, (mine, chosen, tokens) in each(self.rows, rows, views, ask):
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
