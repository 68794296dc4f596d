"""How to sample; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.registry import ORDERS, STOPPING_RULES, OrderName, ScheduleName, name_of

TopPRule = Literal["nucleus", "paper"]

WHOLE_NUMBERS = {"max_new_tokens": (1, checks.LARGEST_TEXT), "steps": (1, checks.LARGEST_SIZE)}


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        max_new_tokens: New tokens per row, up to ten million; past the context the window slides.
        sampler: Order in which positions are fixed: first_hitting (one network evaluation a
            token), ancestral, analytic (SEDD), or threshold (all tokens the network gives a
            probability of 0.9 or more at once).
        steps: Steps per block of the ancestral and analytic samplers.
        schedule: Noise schedule of these.
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens whose probability reaches p.
        top_p_rule: nucleus, or paper for the public code's variant (drops the token crossing p).
        seed: Seed of every random number; the same seed gives the same text.
        stop: What ends a row before max_new_tokens: eos, second_eos (of prompt and text together),
            low_entropy (the last 256 tokens under 4 nats; such a row counts as rejected), several
            of them with commas, paper (second_eos,low_entropy), or none.
        block_size: Block size L' to sample with; the model's own when left out.

    Example:
        >>> import blockdiff
        >>> blockdiff.SamplingOptions(top_p=0.9, seed=1).top_p
        0.9
    """

    max_new_tokens: int = 128
    sampler: OrderName = "first_hitting"
    steps: int | None = None
    schedule: ScheduleName = "linear"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    top_p_rule: TopPRule = "nucleus"
    seed: int = 0
    stop: str = "eos"
    block_size: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers and names that cannot be meant."""
        checks.options(self, WHOLE_NUMBERS, {})
        check_sampler(self.sampler, self.steps)
        stopping_rules(self.stop)


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keywords."""

    max_new_tokens: int
    sampler: OrderName
    steps: int | None
    schedule: ScheduleName
    temperature: float
    top_k: int | None
    top_p: float | None
    top_p_rule: TopPRule
    seed: int
    stop: str
    block_size: int | None


def check_sampler(sampler: str, steps: int | None) -> None:
    """Raises `InputError` unless a sampler that needs a number of steps, and no other, has one."""
    name = name_of(sampler)
    if not ORDERS.has(name, "needs_steps") and not getattr(sampler, "needs_steps", False):
        if steps is not None:
            raise InputError(
                f"{name} finds its own number of steps: leave `steps` out or use the ancestral "
                "sampler"
            )
    elif steps is None:
        raise InputError(f"the {name} sampler needs a number of steps per block; give `steps`")
    else:
        checks.whole_number("steps", steps)


def stopping_rules(stop: str) -> frozenset[str]:
    """The rules a text names; raises `InputError` for one there is not."""
    names = {"none": "", "paper": "second_eos,low_entropy"}.get(stop, stop)
    rules = frozenset(name for name in names.split(",") if name)
    for name in sorted(rules - STOPPING_RULES.keys()):
        raise InputError(
            f"`stop`: no rule {name!r}; choose among {', '.join(STOPPING_RULES)}, or paper, or none"
        )
    if not stop:
        raise InputError(
            f"`stop` is empty; choose among {', '.join(STOPPING_RULES)}, or paper, or none"
        )
    if {"eos", "second_eos"} <= rules:
        raise InputError("`stop`: rules eos and second_eos exclude each other; choose one")
    return rules
