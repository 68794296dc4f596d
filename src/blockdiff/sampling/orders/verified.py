"""Tokens drafted several at a time and verified at L' = 1: see `sampling.verifying`."""

from __future__ import annotations

from blockdiff.registry import register_order
from blockdiff.sampling.orders.base import Order


class Verified(Order):
    """What L' = 1 would write, in fewer evaluations."""

    name = "verified"
    reads = ("drafts", "drafter")
    verifies = True
    tunes = {"drafts": (2, 3, 4)}  # noqa: RUF012


register_order(Verified())
