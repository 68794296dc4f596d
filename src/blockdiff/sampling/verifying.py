"""Draft, then verify: several tokens an evaluation, distributed exactly as at L' = 1.

    drafts d_1 … d_k, d_i drawn from q_i; p_i: what L' = 1 gives after d_1 … d_{i−1}
    d_i is accepted with probability min(1, p_i(d_i) / q_i(d_i)), as long as all before it are
    behind the accepted ones comes one token more: from max(p_i − q_i, 0), made to sum to 1, where
    d_i was refused, from p_{k+1} where none was                       (Leviathan et al. 2023)

p and q are those after temperature, top-k and top-p. Where the clean stream is causal, keys and
values of a token depend on nothing behind it: one pass over the drafts gives all p_i, and those of
what is accepted stay in the cache. With prediction "shift" the clean tokens give p themselves; with
"same" each p_i comes from a masked position that sees the clean tokens before it and no other.

The same evaluation drafts on. How many drafts will be accepted is not known in it, so it has a
noised block for each outcome:

    t  d_1 … d_k | block behind t | block behind d_1 | … | block behind d_k
    clean        | sees t         | sees t, d_1      |   | sees all

where t is the last known token. (In training a block under "shift" begins with a copy of the known
token; that it sees the clean one instead costs no accepted draft, and saves a column.) The block's
tokens are drafted one by one, given the ones before: see `sampling.drafters`. A table of n-grams
needs no blocks.

A position has one random number for its draft, one for accepting it and one for the token that
comes in its place: a draft that is thrown away was never looked at. Past the context each column
sees what it sees at L' = 1: the L − 1 tokens before it.

Shapes: n rows, k drafts, T columns of an evaluation, W of them with logits, S cached tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from blockdiff.cache import BlockCache
from blockdiff.categorical import Array, host_uniform, invert, real_dtype, warp
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.ngrams import Grams
from blockdiff.sampling.constraints import Automaton
from blockdiff.sampling.drafters import drafted, drafter_of, drafts_of, joins
from blockdiff.sampling.guides import NO_TOKEN, RowGuides
from blockdiff.sampling.logprobs import note_logprobs
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.recorded import decoder
from blockdiff.sampling.rows import Rows

T = TypeVar("T")
# What a random number is for: the last part of its address, beside the orders' ORDER and TOKEN.
ACCEPT, INSTEAD, DRAFT = 16, 17, 18


@dataclass(frozen=True)
class Columns:
    """What the T columns of an evaluation are, of k drafts: the same for every row.

    `offset` int64 [T]: position behind that of t. `reach`: how many of the clean columns one sees.
    `block`: the noised block it belongs to, −1 for clean columns. `copies`: the clean column whose
    token it holds, −1 for the mask token. `after`: how many drafts must be there for it to count.
    `number`: its place in its block, from 1; a row that drafts less than others has shorter ones.
    `wanted` int64 [W]: those with logits: of p_1 … p_{k+1}, then of the k drafts of each block.
    """

    offset: Array
    reach: Array
    block: Array
    copies: Array
    after: Array
    number: Array
    wanted: Array

    @classmethod
    @cache
    def of(cls, k: int, same: bool, masks: bool) -> Columns:
        """`same`: the prediction. `masks`: whether there are blocks that draft."""
        rows = [(j, j + 1, -1, j, j, 0) for j in range(k + 1)]
        wanted = list(range(k + 1))
        if same:
            wanted = list(range(len(rows), len(rows) + k + 1))
            rows += [(j + 1, j + 1, j, -1, j, 0) for j in range(k + 1)]
        for a in range(k + 1) if masks and k else ():
            begin = len(rows)
            # Under "shift" a mask has the logits of the token behind it, else of its own.
            rows += [(a + i, a + 1, k + 1 + a, -1, a, i) for i in range(1, k + 1 + same)]
            wanted += range(begin + same, begin + same + k)
        offset, reach, block, copies, after, number = np.array(rows).T
        return cls(offset, reach, block, copies, after, number, np.array(wanted))


class Verifier:
    """The rows of an engine that are drafted and verified, with a cache of their own.

    `tokens` [B, k], `counts` [B] and `q` [B, k, V]: the drafts that wait, of all rows.
    """

    def __init__(self, model: Denoiser, rows: Rows, no_token: Tensor) -> None:
        """`no_token` bool [V]: ids that are never drawn."""
        self.model, self.rows, self.no_token = model, rows, no_token
        self.cache: BlockCache = model.new_cache(0, 0, 1)
        self._decode = decoder(model, self.cache)
        self.tokens, self.counts = np.empty((0, 0), np.int64), np.empty(0, np.int64)
        self.q = torch.empty(0, 0, 0, device=model.device)
        self.waits, self._k = 0, 0  # how often the last evaluation waited for the device; k of it

    def admit(self, places: Array) -> None:
        """Takes the rows at these places of the engine's."""
        state = self.rows.state[places]
        self.cache.admit(places, state["size"], state["capacity"])
        self._room(0)

    def drop(self, place: int) -> None:
        """Forgets a row; those behind it move up."""
        if place >= len(self.counts):
            return  # it came since the last row that is drafted
        self.tokens, self.counts = np.delete(self.tokens, place, 0), np.delete(self.counts, place)
        self.q = torch.cat([self.q[:place], self.q[place + 1 :]])

    def _room(self, k: int) -> None:
        rows, k = len(self.rows.state), max(k, self.tokens.shape[1])
        if self.q.shape[:2] == (rows, k):
            return
        grown = np.zeros((rows, k), np.int64)
        grown[: self.tokens.shape[0], : self.tokens.shape[1]] = self.tokens
        self.tokens = grown
        self.counts = np.append(self.counts, np.zeros(rows - len(self.counts), np.int64))
        q = self.q.new_zeros(rows, k, len(self.no_token))
        q[: self.q.shape[0], : self.q.shape[1], : self.q.shape[2]] = self.q
        self.q = q

    def step(self) -> tuple[Array, Array, Array]:
        """One evaluation: the rows in it, and rows and positions of what it fixed."""
        self.waits = 0
        rows, state = self.cache.rows, self.rows.state
        known, counts = state["known"][rows], self.counts[rows]
        k, masks = int(counts.max(initial=0)), False
        plans: list[tuple[Array, SamplingOptions, int]] = []
        blocks = np.zeros(len(rows), np.int64)
        for number in np.unique(state["group"][rows]).tolist():
            options = self.rows.groups[number][0]
            drafts = drafts_of(options, self.model)
            place = (state["group"][rows] == number).nonzero()[0]
            plans.append((place, options, drafts))
            blocks[place] = drafts
            k = max(k, drafts)
            masks |= drafter_of(options, self.model) == "masks"
        self._k = k
        same = self.model.config.prediction == "same"
        columns = Columns.of(k, same, masks)
        valid = (columns.after <= counts[:, None]) & (columns.number <= blocks[:, None] + same)
        logits = self._evaluate(rows, known, valid, columns)
        # For each purpose, row and position from the first unknown one on.
        ahead = known[:, None] + np.arange(2 * k + 1)
        seed, line = (state[part][rows][:, None] for part in ("seed", "number"))
        u = host_uniform(seed, line, ahead, np.array([ACCEPT, INSTEAD, DRAFT])[:, None, None])
        taken, tokens = np.zeros(len(rows), np.int64), np.zeros((len(rows), k + 1), np.int64)
        guided = self._guided(rows, known, counts, logits)
        for own, options, _ in plans:
            taken[own], tokens[own] = self._verify(rows, u[:2], guided, own, options)
        going = state["length"] < 0  # those that did not fail
        place, offset = ((np.arange(k + 1) <= taken[:, None]) & going[rows][:, None]).nonzero()
        right = self.rows.are_tokens(rows[place], tokens[place, offset])
        place, offset = place[right], offset[right]
        at, new = known[place] + offset, tokens[place, offset]
        self.rows.canvas[rows[place], at] = new
        note_logprobs(self.rows, logits, (place, offset), new, rows[place], at)
        self.cache.append_first(np.arange(len(rows)), taken + 1, len(columns.offset))
        for own, options, drafts in plans:
            own = own[state["length"][rows[own]] < 0]
            if len(own):
                self._draft(rows, known, taken, u[2], logits, own, options, drafts)
        state["evaluations"][rows] += 1
        return rows, rows[place], at

    def _evaluate(self, rows: Array, known: Array, valid: Array, columns: Columns) -> Tensor:
        """Logits [n, W, V], float32; `valid` bool [n, T]: the columns that count."""
        device, config, k = self.model.device, self.model.config, self._k
        last = self.rows.canvas[rows, known - 1][:, None]
        waiting = self.tokens[rows]
        waiting = np.pad(waiting, ((0, 0), (0, max(k - waiting.shape[1], 0))))[:, :k]
        clean = np.concatenate([last, waiting], axis=1)
        x = np.where(columns.copies < 0, config.mask_token_id, clean[:, columns.copies])
        position = known[:, None] - 1 + columns.offset
        parts = torch.from_numpy(np.stack([x, position])).to(device, non_blocking=True)
        at = np.arange(len(rows))[:, None] * x.shape[1] + columns.wanted
        self.cache.make_room(x.shape[1])
        mask = self._mask(position, valid, self.rows.state["capacity"][rows], columns)
        logits = self._decode(
            parts[0], parts[1], self.cache, torch.from_numpy(at.flatten()).to(device),
            mask=mask, clean=k + 1,
        ).float()  # fmt: skip
        logits = logits.masked_fill(self.no_token, -torch.inf)
        return logits.unflatten(0, (len(rows), -1))

    def _mask(self, position: Array, valid: Array, reach: Array, columns: Columns) -> Tensor:
        """[n, 1, T, T + S]: 0 where a column may attend, −inf where not."""
        column = np.arange(len(columns.offset))
        sees = (column < columns.reach[:, None]) & (columns.block < 0)
        sees |= (columns.block == columns.block[:, None]) & (columns.block >= 0)
        near = columns.offset >= columns.offset[:, None] - reach[:, None, None]
        own = sees & valid[:, None, :] & near | np.eye(len(column), dtype=bool)
        device, cache = self.model.device, self.cache
        in_ring = cache.key_positions()
        first = torch.from_numpy(position - reach[:, None]).to(device, non_blocking=True)
        ring = (in_ring >= 0)[:, None] & (in_ring[:, None] >= first[:, :, None])
        seen = torch.cat([torch.from_numpy(own).to(device, non_blocking=True), ring], -1)[:, None]
        return torch.zeros(seen.shape, dtype=cache.dtype, device=device).masked_fill_(
            ~seen, -torch.inf
        )

    def _guided(self, rows: Array, known: Array, counts: Array, logits: Tensor) -> Tensor:
        """Logits of p after what changes or restricts those of some rows."""
        found = logits
        for place, row in enumerate(rows):
            guides = self.rows.guides[self.rows.state["group"][row]]
            if not guides:
                continue
            found = logits.clone() if found is logits else found
            own = RowGuides(
                guides.guides, self.rows.canvas[row, : known[place]], self.rows.automata[row]
            )
            plain = logits[place, : counts[place] + 1]
            drafts = self.tokens[row, : counts[place]].tolist()
            new = self._tried(row, partial(own.along, plain, drafts))
            if new is None:
                continue
            # Behind a draft that ends the text, or is not allowed, nothing is asked.
            dead = (new == -torch.inf).all(-1, keepdim=True)
            if dead[0]:
                self.rows.fail(int(row), InputError(NO_TOKEN))
            found[place, : counts[place] + 1] = torch.where(dead, plain, new)
        return found

    def _verify(
        self, rows: Array, u: Array, logits: Tensor, own: Array, options: SamplingOptions
    ) -> tuple[Array, Array]:
        """How many drafts of the rows at `own` are accepted; these tokens, and one more.

        `u` [2, n, k + 1 or more]: random numbers to accept with and to draw anew.
        """
        rows, device = rows[own], logits.device
        width, index = self.tokens.shape[1], torch.from_numpy(rows).to(device)
        total = 1 + min(width, self._k)
        given = logits[torch.from_numpy(own).to(device), :total]
        p = warped(given.flatten(0, 1), options).softmax(-1).unflatten(0, given.shape[:2])
        accept, instead = self._real(u[:, own, :total])
        drafts = self.tokens[rows, : total - 1]
        there = np.arange(total - 1) < self.counts[rows][:, None]
        d = torch.from_numpy(drafts).to(device)[..., None]
        is_there = torch.from_numpy(there).to(device)
        q = self.q[index, : total - 1] * is_there[..., None]
        chance, drawn = self._chances(p[:, :-1], q, d)
        run = ((accept[:, :-1] * drawn < chance) & is_there).to(torch.int64).cumprod(1).sum(1)
        rest = torch.cat([self._rest(p[:, :-1], q), p[:, -1:]], 1)
        # Where p and q differ by rounding alone nothing is left.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
        line = torch.arange(len(rows), device=device)
        last = rest[line, run]
        drawn = invert(last, instead[line, run]).where(last.sum(-1).isfinite(), -1)
        found = torch.stack([run, drawn]).cpu().numpy()
        self.waits += 1
        tokens = np.zeros((len(rows), self._k + 1), np.int64)
        tokens[:, : total - 1] = drafts
        tokens[np.arange(len(rows)), found[0]] = found[1]
        return found[0], tokens

    @staticmethod
    def _chances(p: Tensor, q: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """p and q [n, k] of the drafts [n, k, 1]."""
        return p.gather(-1, drafts).squeeze(-1), q.gather(-1, drafts).squeeze(-1)

    @staticmethod
    def _rest(p: Tensor, q: Tensor) -> Tensor:
        """What a refused draft is replaced from, [n, k, V]."""
        return (p - q).clamp(min=0)

    def _draft(
        self,
        rows: Array,
        known: Array,
        taken: Array,
        u: Array,
        logits: Tensor,
        own: Array,
        options: SamplingOptions,
        drafts: int,
    ) -> None:
        """Draws what the rows at `own` try next, as far as there is room for it.

        `u` [n, 2k + 1]: random numbers of the positions from `known` on.
        """
        begin, rows, device = (known + taken + 1)[own], rows[own], logits.device
        counts = np.clip(self.rows.state["end"][rows] - begin - 1, 0, drafts)
        ends = zip(rows.tolist(), begin.tolist(), strict=True)
        automata = [self._tried(row, partial(self._ahead, row, end)) for row, end in ends]
        counts *= [one is None or not one.finished for one in automata]
        self.counts[rows] = counts
        drafts = int(counts.max(initial=0))
        self._room(drafts)
        before = [self.rows.canvas[rows, np.maximum(begin - back, 0)] for back in (2, 1)]
        line, index = (torch.from_numpy(x).to(device) for x in (own, rows))
        group = torch.from_numpy(self._k + 1 + taken[own] * self._k).to(device)
        masks = drafter_of(options, self.model) == "masks"
        uniforms = self._real(u[own[:, None], (taken + 1)[own][:, None] + np.arange(drafts)])
        grams = []
        if drafts and joins(options, self.model):
            size, table = self.model.config.vocab_size, self.model.draft_table
            texts = (self.rows.canvas[row, :end] for row, end in zip(rows, begin, strict=True))
            grams = [Grams(text, size, table) for text in texts]
        for i in range(drafts):
            masked = logits[line, group + i] if masks else None
            found = drafted(self.model, masked, grams, (before[0], before[1]))
            found = found.masked_fill_(self.no_token, -torch.inf)
            q = warped(self._allowed(found, rows, automata), options).softmax(-1)
            token = invert(q, uniforms[:, i])
            self.q[index, i] = q
            self.tokens[rows, i] = token.cpu().numpy()
            self.waits += 1
            before = [before[1], self.tokens[rows, i]]
            for row, automaton, new in zip(rows, automata, before[1].tolist(), strict=True):
                if automaton is not None and not automaton.finished:
                    self._tried(row, partial(automaton.advance, new))

    def _ahead(self, row: int, end: int) -> Automaton | None:
        """The row's automaton behind the first `end` tokens, of which some were just fixed."""
        automaton = self.rows.automata[row]
        if automaton is None:
            return None
        ahead = automaton.copy()
        for token in self.rows.canvas[row, self.rows.state["known"][row] : end].tolist():
            if ahead.finished:
                break
            ahead.advance(token)
        return ahead

    def _allowed(self, logits: Tensor, rows: Array, automata: list[Automaton | None]) -> Tensor:
        """Logits [n, V] without what the rows' automata do not allow: it would be refused."""
        for place, automaton in enumerate(automata):
            if automaton is None or automaton.finished:
                continue
            allowed = self._tried(rows[place], automaton.allowed)
            if allowed is not None:
                may = torch.from_numpy(allowed).to(logits.device)
                logits[place, : len(may)].masked_fill_(~may[: logits.shape[1]], -torch.inf)
                logits[place, len(may) :] = -torch.inf
        return logits

    def _tried(self, row: int, work: Callable[[], T]) -> T | None:
        """What `work` gives; where it raises, the row fails."""
        try:
            return work()
        except Exception as error:
            self.rows.fail(int(row), error)
            return None

    def _real(self, u: Array) -> Tensor:
        return torch.from_numpy(u).to(self.model.device, real_dtype(self.model.device))


def warped(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits [P, V] after the options' temperature, top-k and top-p."""
    return warp(
        logits,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        top_p_rule=options.top_p_rule,
    )
