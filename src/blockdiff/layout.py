"""Which position may look at which: the block structure of a sequence.

A sequence of L tokens is cut into N = L/L' blocks. The network reads two streams, the noised x_t
and the clean x_0, both at positions 0…L−1. With block(i) the block of position i, query i may
attend to key j when (section 3.1 and appendix B of the paper)

    M_BD   both in x_t, block(i) = block(j)               a noised block sees itself
    M_OBC  query in x_t, key in x_0, block(i) > block(j)  and the clean blocks before it
    M_BC   both in x_0, block(i) ≥ block(j)               a clean block sees itself and those before

(in x_0 the paper's M_BD is part of M_BC). One stream alone under M_BC is, with L' = L, the
bidirectional network of MDLM, and with L' = 1 a causal one: AR. `window` bounds how far back a
query sees, for text longer than the context it was trained on.

Networks made from a causal language model keep more of its habits. With a `causal` clean stream
M_BC is i ≥ j: keys and values of x_0 are then the same for every block size. With a `causal` inside
M_BD asks for i ≥ j as well. `sliding` hides keys that are too many tokens back, in all three parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from blockdiff import checks
from blockdiff.checks import whole_number
from blockdiff.errors import InputError

Clean = Literal["block", "causal"]
Inside = Literal["bidirectional", "causal"]
Prediction = Literal["same", "shift"]


@dataclass(frozen=True)
class BlockLayout:
    """L positions in blocks of L': all that says who may attend to whom.

    `window`: a query sees its own block and the clean tokens of the `window / block_size − 1`
    blocks before it; None means all. `documents` int64 [B, L]: positions attend within their own
    document only (padding is a document of its own); None where each row is one. `clean`: what a
    clean token sees of its block, all of it or, "causal", the tokens up to itself; `inside`: what a
    noised one sees of its own. `sliding`: no query sees a key `sliding` or more tokens before it.
    `prediction` "shift": the clean stream predicts the first token of a block, which is therefore
    never masked. `offset`: how many positions the first block is short of. Frozen and, but for the
    documents, compared and hashed by value: masks are cached under `plain`. Raises `InputError`
    when the sizes do not fit each other.

    Example:
        >>> import blockdiff
        >>> blockdiff.BlockLayout(length=12, block_size=4).blocks
        3
    """

    length: int
    block_size: int
    window: int | None = None
    documents: Tensor | None = field(default=None, compare=False, repr=False)
    clean: Clean = "block"
    inside: Inside = "bidirectional"
    sliding: int | None = None
    prediction: Prediction = "same"
    offset: int = 0

    def __post_init__(self) -> None:
        checks.numbers(length=self.length, block_size=self.block_size)
        checks.one_of("clean", self.clean, get_args(Clean))
        checks.one_of("inside", self.inside, get_args(Inside))
        if self.sliding is not None:
            whole_number("sliding", self.sliding)
        if (self.length + self.offset) % self.block_size:
            raise InputError(
                f"block size {self.block_size} does not divide length {self.length}; "
                f"choose a divisor, for example {self._nearest_divisor()}"
            )
        if self.window is not None and whole_number("window", self.window) % self.block_size:
            raise InputError(
                f"window {self.window} is not a positive multiple of the block size "
                f"{self.block_size}"
            )

    def _nearest_divisor(self) -> int:
        divisors = (d for d in range(1, self.length + 1) if self.length % d == 0)
        return min(divisors, key=lambda d: abs(d - self.block_size))

    @property
    def plain(self) -> BlockLayout:
        """The same without documents."""
        return self if self.documents is None else replace(self, documents=None)

    @property
    def blocks(self) -> int:
        """N, the number of blocks."""
        return (self.length + self.offset) // self.block_size

    def starts(self, device: torch.device) -> Tensor:
        """bool [L]: the first token of each block."""
        return torch.arange(self.length, device=device) % self.block_size == 0

    def by_block(self, per_token: Tensor) -> Tensor:
        """[.., L] → [.., N, L']."""
        return per_token.unflatten(-1, (self.blocks, self.block_size))

    def per_token(self, per_block: Tensor) -> Tensor:
        """[.., N] → [.., L]: each block's value at all of its tokens."""
        return per_block.repeat_interleave(self.block_size, -1)

    def block_of(self, position: Tensor) -> Tensor:
        return (position + self.offset) // self.block_size

    def in_window(self, query: Tensor, key: Tensor) -> Tensor | bool:
        """Whether `key` and its block are not too far before `query` and its block."""
        near: Tensor | bool = True
        if self.window is not None:
            reach = self.window // self.block_size
            near = self.block_of(query) - self.block_of(key) < reach
        return near if self.sliding is None else near & (query - key < self.sliding)

    def m_bd(self, query: Tensor, key: Tensor) -> Tensor:
        """Noised query, noised key; positions broadcast, bool out."""
        own = (self.block_of(query) == self.block_of(key)) & self.in_window(query, key)
        return own & (query >= key) if self.inside == "causal" else own

    def m_obc(self, query: Tensor, key: Tensor) -> Tensor:
        """Noised query, clean key."""
        return (self.block_of(query) > self.block_of(key)) & self.in_window(query, key)

    def m_bc(self, query: Tensor, key: Tensor) -> Tensor:
        """Clean query, clean key."""
        if self.clean == "causal":
            return (query >= key) & self.in_window(query, key)
        return (self.block_of(query) >= self.block_of(key)) & self.in_window(query, key)

    def noised_sees(self, query: Tensor, key: Tensor) -> Tensor:
        """A noised query over the 2L keys x_0 ⊕ x_t; `key` counts through both."""
        in_x_t = key >= self.length
        position = key % self.length
        return torch.where(in_x_t, self.m_bd(query, position), self.m_obc(query, position))

    def two_stream_sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Query and key both count through the 2L tokens x_0 ⊕ x_t: the paper's whole mask."""
        clean = (key < self.length) & self.m_bc(query, key)
        noised = self.noised_sees(query % self.length, key)
        return torch.where(query < self.length, clean, noised)
