"""How to sample; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.registry import ORDERS, STOPPING_RULES, OrderName, ScheduleName, name_of

if TYPE_CHECKING:
    from blockdiff.sampling.stopping import StoppingRule

    Stop: TypeAlias = str | StoppingRule | Iterable[str | StoppingRule]
else:
    Stop = str  # what the command line takes

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
            of them with commas, paper (second_eos,low_entropy), or none. From Python also a
            StoppingRule, or a list of rules and names.
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
    stop: Stop = "eos"
    block_size: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers and names that cannot be meant."""
        checks.options(self, WHOLE_NUMBERS, {}, own=["stop"])
        check_sampler(self.sampler, self.steps)
        stopping_rules(self.stop)
        if not isinstance(self.stop, str):
            object.__setattr__(self, "stop", stop_parts(self.stop))


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
    stop: Stop
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


def stop_parts(stop: Stop) -> tuple[str | StoppingRule, ...]:
    """The names and objects in `stop`; raises `InputError` for what is neither."""
    listed: Any = stop
    if isinstance(stop, str) or STOPPING_RULES.is_object(stop):
        listed = [stop]
    elif not isinstance(stop, Iterable):
        listed = [None]
    parts = tuple(listed)
    if not all(isinstance(one, str) or STOPPING_RULES.is_object(one) for one in parts):
        raise InputError(f"`stop` is {stop!r}; it must be names, StoppingRules, or a list")
    if not parts or "" in parts:
        raise InputError(
            f"`stop` is empty; choose among {', '.join(STOPPING_RULES)}, or paper, or none"
        )
    return parts


def stopping_rules(stop: Stop) -> frozenset[str]:
    """The rules that are named; raises `InputError` for one there is not, and for other things."""
    names = [one for one in stop_parts(stop) if isinstance(one, str)]
    known = {"none": "", "paper": "second_eos,low_entropy"}
    listed = ",".join(known.get(one, one) for one in names)
    rules = frozenset(name for name in listed.split(",") if name)
    for name in sorted(rules - STOPPING_RULES.keys()):
        raise InputError(
            f"`stop`: no rule {name!r}; choose among {', '.join(STOPPING_RULES)}, or paper, or none"
        )
    if {"eos", "second_eos"} <= rules:
        raise InputError("`stop`: rules eos and second_eos exclude each other; choose one")
    return rules
