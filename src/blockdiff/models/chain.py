"""A chain over drafted tokens: what the token before says, beside what the network says.

    logits of a drafted token = the network's + W U[the token before]

A block that is drafted in one evaluation has independent tokens, and that is what keeps most of
them from being accepted. W U is the logits of a bigram model, of low rank: outside the network, and
a small matrix product a token. Only a drafter adds it. Likelihoods and all other orders are those
of the network alone.

Shapes: V vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class Chain(nn.Module):
    """U [V, r] and W [V, r]; W begins at 0, so that a new chain changes nothing.

    Example:
        >>> import torch, blockdiff
        >>> from blockdiff.models.chain import Chain
        >>> chain = Chain(vocab_size=9, rank=2)
        >>> chain(torch.tensor([[3, 5]])).shape
        torch.Size([1, 2, 9])
    """

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.previous = nn.Parameter(torch.empty(vocab_size, rank))
        self.out = nn.Parameter(torch.empty(vocab_size, rank))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The weights it begins with; those that a folder has set stay."""
        init.normal_(self.previous)
        init.zeros_(self.out)

    def forward(self, previous: Tensor) -> Tensor:
        """Logits [.., V] to add to those of the tokens that follow `previous`, int64 [..]."""
        return F.linear(F.embedding(previous, self.previous), self.out)


def chain_of(config: Any) -> Chain | None:
    """The chain of a model whose configuration has a `chain_rank`; None at 0."""
    return Chain(config.vocab_size, config.chain_rank) if config.chain_rank else None
