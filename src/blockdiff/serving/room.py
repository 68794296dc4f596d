"""How many rows memory has room for.

A row takes, for each token that its cache may hold or an evaluation stages, the keys and values of
all layers; and logits of the positions an evaluation asks for, with what is made of them. The cache
is a rectangle, as long as its longest row, and while it grows the old one and the new are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blockdiff.models.denoiser import Denoiser
from blockdiff.models.tensors import free_memory
from blockdiff.registry import ORDERS
from blockdiff.sampling.fitting import fitted
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.orders.base import Order

# Of free memory what rows and kept beginnings may take: twice this while the cache grows.
SHARE = 0.4
# Beside it, of that, and at most so much.
PREFIX_SHARE, PREFIX_BYTES = 0.25, 2**30
MOST_ROWS = 128
# Bytes for each logit: float32, its probability, and a copy that is cut or sorted.
LOGIT = 12
# Columns of a drafted row's evaluation, of which about half have logits.
DRAFTED = 64

Need = tuple[int, int]  # tokens of the cache, bytes beside it


@dataclass(frozen=True)
class Room:
    """`free` bytes there were, of which `cache` are for rows and `prefixes` for beginnings.

    `token`: bytes of a token of the cache. `whole`: bytes of a row of the whole context. `rows`:
    how many may be written side by side.
    """

    free: int
    cache: int
    prefixes: int
    token: int
    whole: int
    rows: int

    @classmethod
    def of(cls, model: Denoiser, rows: int | None = None, memory: int | None = None) -> Room:
        """By `memory` bytes, a share of what is free where they are left out."""
        free = free_memory([model.device])
        given = int(SHARE * free) if memory is None else memory
        prefixes = min(int(PREFIX_SHARE * given), PREFIX_BYTES)
        cache = model.new_cache(0, 0, 1)
        token = sum(one.heads * (one.key_width + one.value_width) for one in cache.layers)
        token *= cache.dtype.itemsize
        size, _ = model.config.sampling_blocks()
        length = model.config.length
        reads = size if size < length else 1
        whole = (length + size) * token + reads * model.config.vocab_size * LOGIT
        fit = max(min((given - prefixes) // whole, MOST_ROWS), 1)
        counted = fit if rows is None else rows
        return cls(free, given - prefixes, prefixes, token, whole, counted)

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of up to {_bytes(self.whole)} each ({_bytes(self.cache)} of "
            f"{_bytes(self.free)} free memory), {_bytes(self.prefixes)} for known beginnings"
        )

    def fits(self, needs: Iterable[Need]) -> bool:
        """Whether rows of these needs have room side by side."""
        needs = list(needs)
        longest = max((tokens for tokens, _ in needs), default=0)
        beside = sum(other for _, other in needs)
        return len(needs) * longest * self.token + beside <= self.cache


def need_of(model: Denoiser, prompt: int, options: SamplingOptions) -> Need:
    """What a row with a prompt of so many tokens takes of a model's cache, and beside it."""
    config, order = model.config, ORDERS.find(options.sampler, "sampler")
    size = fitted(config, [], options).size
    text = prompt + options.max_new_tokens
    if config.length <= size:  # nothing is cached; twice the window is staged
        tokens = 2 * (size if config.slides else text)
    else:
        tokens = min(config.length - size, -(-text // size) * size) + 2 * size
    reads = size
    if type(order).wanted is not Order.wanted:
        reads = -(-size // (size if options.steps is None else options.steps))
    if order.verifies:
        tokens, reads = tokens + DRAFTED, DRAFTED // 2
    if options.cfg_scale:
        tokens, reads = 2 * tokens, 2 * reads
    return tokens, reads * config.vocab_size * LOGIT


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
