"""How to sample; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.registry import ScheduleName

Sampler = Literal["first_hitting", "ancestral", "analytic"]
TopPRule = Literal["nucleus", "paper"]

SAMPLERS: tuple[str, ...] = get_args(Sampler)
WHOLE_NUMBERS = {"max_new_tokens": (1, checks.LARGEST_TEXT), "steps": (1, checks.LARGEST_SIZE)}
RULES = ("eos", "second_eos", "low_entropy")


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        max_new_tokens: New tokens per row, up to ten million; past the context the window slides.
        sampler: first_hitting (one network evaluation a token), ancestral, or analytic (SEDD).
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
    sampler: Sampler = "first_hitting"
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
    sampler: Sampler
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
    """Raises `InputError` unless the sampler exists and its steps make sense."""
    checks.one_of("sampler", sampler, SAMPLERS)
    if sampler == "first_hitting":
        if steps is not None:
            raise InputError(
                "first_hitting takes one step per token: leave `steps` out or use the ancestral "
                "sampler"
            )
    elif steps is None:
        raise InputError(f"the {sampler} sampler needs a number of steps per block; give `steps`")
    else:
        checks.whole_number("steps", steps)


def stopping_rules(stop: str) -> frozenset[str]:
    """The rules a text names; raises `InputError` for one there is not."""
    names = {"none": "", "paper": "second_eos,low_entropy"}.get(stop, stop)
    rules = frozenset(name for name in names.split(",") if name)
    for name in sorted(rules - set(RULES)):
        raise InputError(
            f"`stop`: no rule {name!r}; choose among {', '.join(RULES)}, or paper, or none"
        )
    if not stop:
        raise InputError(f"`stop` is empty; choose among {', '.join(RULES)}, or paper, or none")
    if {"eos", "second_eos"} <= rules:
        raise InputError("`stop`: rules eos and second_eos exclude each other; choose one")
    return rules
