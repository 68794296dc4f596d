"""How to sample; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
Remasking = Literal["low_confidence", "random"]
Drafter = Literal["auto", "masks", "table"]

WHOLE_NUMBERS = {
    "max_new_tokens": (1, checks.LARGEST_TEXT),
    "steps": (1, checks.LARGEST_SIZE),
    "tokens_per_step": (1, checks.LARGEST_SIZE),
    "sub_block": (1, checks.LARGEST_SIZE),
    "drafts": (1, 64),
}
REAL_NUMBERS = {
    "threshold": (0, 1, False, False),
    "margin": (0, 1, False, False),
    "entropy_bound": (0, 1e30, False, False),
    "edit_threshold": (0, 1, False, False),
    "repetition_penalty": (0.01, 100, False, False),
    "cfg_scale": (0, 1e6, False, False),
}
# Fields of which the command line knows nothing.
FROM_PYTHON = {"from_python": True}
# Fields that `guiding` checks; of the CONSTRAINTS a row has one at most.
CONSTRAINTS = ("regex", "json_schema", "choices", "constraint")
NEED_TOKENIZER = ("stop_strings", "regex", "json_schema", "choices")
GUIDING = ("logit_bias", "stop_strings", "logits_processor", *CONSTRAINTS)


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        max_new_tokens: New tokens per row, up to ten million; past the context the window slides.
        sampler: Order in which positions are fixed: first_hitting (one network evaluation a
            token), ancestral, analytic (SEDD), or one that reads the logits and fixes several at
            once: confidence, threshold, margin, entropy, entropy_bound, editing. verified drafts
            several tokens and verifies them at L' = 1: exact, and for models with a causal clean
            stream. auto is the first of these that reads what is set below, and first_hitting
            where nothing is.
        steps: Steps per block: a block's tokens are split evenly over so many. ancestral and
            analytic need it; the orders with a threshold or bound fix at least as many a step.
        tokens_per_step: Tokens that confidence, margin and entropy fix an evaluation (1 without
            `steps`); with a threshold or bound the least.
        threshold: Fix every token that the network gives this probability or more (default 0.9).
        margin: Fix where the most likely token leads the second by this probability or more.
        entropy_bound: Fix the surest positions as long as the entropies of all but the last of
            them sum to so many nats at most (default 0.1).
        remasking: Which positions confidence leaves masked: low_confidence (those it is least sure
            of), or random.
        drafts: Tokens that verified drafts an evaluation; by default 3 masks, as far as the model's
            blocks have room, or 4 of a table.
        drafter: What drafts them: masks (a block of the model itself, joined by its chain or by
            n-grams), table (n-grams of the model's draft table and of the text so far), or auto
            (table for AR models and those with a draft table and no chain, else masks).
        edit_threshold: editing revises a token of the block that has become less probable than
            this, once (default 0.2).
        schedule: Noise schedule of ancestral and analytic [linear].
        temperature: Divides the logits; 0 is greedy.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens whose probability reaches p.
        top_p_rule: nucleus, or paper for the public code's variant (drops the token crossing p).
        seed: Seed of every random number; the same seed gives the same text.
        stop: What ends a row before max_new_tokens: eos, second_eos (of prompt and text together),
            low_entropy (the last 256 tokens under 4 nats; such a row counts as rejected), several
            of them with commas, paper (second_eos,low_entropy), or none. From Python also a
            StoppingRule, or a list of rules and names.
        block_size: Block size L' to sample with; the model's own when left out. A model that
            attends to its whole text (LLaDA, Dream, MDLM) writes it in parts of this size.
        sub_block: Fix a block's tokens in parts of so many, from the left; the network sees the
            whole block all the same (Fast-dLLM v2's small blocks).
        logprobs: Also give the log-probability of each new token in the evaluation that fixed it,
            before temperature and cuts: the path's own, whose sum is not that of the text.
        repetition_penalty: Makes tokens of prompt and text less likely: their logits are divided by
            this where they are above 0, else multiplied [1].
        logit_bias: Adds to the logits of a token, ID=NUMBER; -inf bans it.
        cfg_scale: Classifier-free guidance by the text without its prompt: logits become
            un + (s + 1)·(cond − un); 0 is off.
        stop_strings: Texts that end a row with the token that completes one.
        regex: Regular expression that the new text has to match as a whole.
        json_schema: JSON schema, or a file with one, that the new text has to be valid by; written
            without free white space.
        choices: Texts of which the new one has to be one.
        logits_processor: transformers' LogitsProcessor, a list of them, or a callable (input_ids
            [m, T], scores [m, V]) → scores. One that reads `input_ids` has the row written from
            left to right; `reads_context = False` on it says that it does not.
        constraint: What `constrain` made, or an object with its `begin`, in the place of `regex`.

    Example:
        >>> import blockdiff
        >>> blockdiff.SamplingOptions(top_p=0.9, seed=1).top_p
        0.9
    """

    max_new_tokens: int = 128
    sampler: OrderName = "auto"
    steps: int | None = None
    tokens_per_step: int | None = None
    threshold: float | None = None
    margin: float | None = None
    entropy_bound: float | None = None
    remasking: Remasking | None = None
    edit_threshold: float | None = None
    drafts: int | None = None
    drafter: Drafter | None = None
    schedule: ScheduleName | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    top_p_rule: TopPRule = "nucleus"
    seed: int = 0
    stop: Stop = "eos"
    block_size: int | None = None
    sub_block: int | None = None
    logprobs: bool = False
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | list[str] | None = None
    cfg_scale: float | None = None
    stop_strings: list[str] | str | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | str | None = None
    choices: list[str] | str | None = None
    logits_processor: Any | None = field(default=None, metadata=FROM_PYTHON)
    constraint: Any | None = field(default=None, metadata=FROM_PYTHON)

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers and names that cannot be meant."""
        checks.options(self, WHOLE_NUMBERS, REAL_NUMBERS, own=["stop", *GUIDING])
        for name, value in guiding(self).items():
            object.__setattr__(self, name, value)
        given = given_settings(vars(self))
        if self.sampler == "auto":
            object.__setattr__(self, "sampler", implied_sampler(given))
        check_sampler(self.sampler, given)
        stopping_rules(self.stop)
        if not isinstance(self.stop, str):
            object.__setattr__(self, "stop", stop_parts(self.stop))


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keywords."""

    max_new_tokens: int
    sampler: OrderName
    steps: int | None
    tokens_per_step: int | None
    threshold: float | None
    margin: float | None
    entropy_bound: float | None
    remasking: Remasking | None
    edit_threshold: float | None
    drafts: int | None
    drafter: Drafter | None
    schedule: ScheduleName | None
    temperature: float
    top_k: int | None
    top_p: float | None
    top_p_rule: TopPRule
    seed: int
    stop: Stop
    block_size: int | None
    sub_block: int | None
    logprobs: bool
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | list[str] | None
    cfg_scale: float | None
    stop_strings: Sequence[str] | str | None
    regex: str | None
    json_schema: Mapping[str, Any] | str | None
    choices: Sequence[str] | str | None
    logits_processor: Any
    constraint: Any


# What other programs call our options. `steps` here are those of a block: a word that elsewhere
# means those of the whole text is refused.
ALIASES = {
    "block_length": "block_size",
    "canvas_length": "block_size",
    "small_block_size": "sub_block",
    "gen_length": "max_new_tokens",
    "denoising_steps": "steps",
    "max_denoising_steps": "steps",
    "steps_per_block": "steps",
    "confidence_threshold": "threshold",
    "alg": "sampler",
    "remasking_strategy": "sampler",
}
AMBIGUOUS = dict.fromkeys(
    ("diffusion_steps", "nfe", "num_inference_steps", "num_steps", "sampling_steps"),
    "may mean the steps of a block or of the whole text: give `steps`, those of a block",
)
# Dream's and SDAR's names of orders.
_THEIR_ORDERS: dict[str, dict[str, Any]] = {
    "maskgit_plus": {"sampler": "confidence"},
    "topk_margin": {"sampler": "margin"},
    "entropy": {"sampler": "entropy"},
    "origin": {"sampler": "ancestral"},
    "low_confidence": {"sampler": "confidence"},
    "low_confidence_static": {"sampler": "confidence"},
    "low_confidence_dynamic": {"sampler": "threshold"},
    "entropy_bounded": {"sampler": "entropy_bound"},
    "random": {"sampler": "confidence", "remasking": "random"},
}


def translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options under our names; raises `InputError` for an ambiguous name, or two for one option.

    Example:
        >>> from blockdiff.sampling.options import translated
        >>> translated({"alg": "topk_margin", "block_length": 4, "seed": 1})
        {'sampler': 'margin', 'block_size': 4, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in AMBIGUOUS:
            raise InputError(f"`{name}` {AMBIGUOUS[name]}")
        parts = {ALIASES.get(name, name): value}
        if ALIASES.get(name) == "sampler" and value is not None:
            if value not in _THEIR_ORDERS:
                raise InputError(
                    f"`{name}` {value!r} is unknown; choose one of {', '.join(_THEIR_ORDERS)}, or "
                    f"give a `sampler`: {', '.join(ORDERS)}"
                )
            parts = _THEIR_ORDERS[value]
        for ours in parts.keys() & found.keys():
            raise InputError(f"`{ours}` is given twice, once as `{name}`; leave one out")
        found |= parts
    return found


def guiding(options: SamplingOptions) -> dict[str, Any]:
    """What guides the logits, as the sampler reads it; `InputError` for what cannot be meant.

    Whether a tokenizer can spell it is asked when there is one (`sampling.guides.bound`).
    """
    given = [f"`{name}`" for name in CONSTRAINTS if getattr(options, name) is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other; give one constraint")
    for name, kinds in (("regex", str), ("json_schema", str | Mapping)):
        value = getattr(options, name)
        if not isinstance(value, kinds | None):
            what = "text" if kinds is str else "a schema: a mapping, its text, or a file's name"
            raise InputError(f"`{name}` is {type(value).__name__}; it must be {what}")
    if options.constraint is not None and not hasattr(options.constraint, "begin"):
        raise InputError("`constraint` has no `begin`; give what `constrain` made, or `regex`")
    found = {name: _texts(name, getattr(options, name)) for name in ("choices", "stop_strings")}
    calls = options.logits_processor
    members = calls if isinstance(calls, list | tuple) else [calls]
    if calls is not None and not (members and all(map(callable, members))):
        raise InputError(f"`logits_processor` {calls!r} cannot be called; give a LogitsProcessor")
    return {**found, "logit_bias": _biases(options.logit_bias)}


def _texts(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise InputError(f"`{name}` is {value!r}; it must be text, or a list of texts")
    if not listed or "" in listed:
        raise InputError(f"`{name}` {'holds an empty text' if listed else 'is empty'}; give texts")
    return tuple(listed)


def _biases(given: Any) -> dict[int, float] | None:
    """id → number; what the command line has is `id=number`."""
    if given is None:
        return None
    pairs = given.items() if isinstance(given, Mapping) else given
    if isinstance(given, str):
        pairs = [given]
    if not isinstance(pairs, Iterable) or given == []:
        raise InputError(f"`logit_bias` is {given!r}; it must map ids to numbers")
    found: dict[int, float] = {}
    for pair in pairs:
        try:
            token, number = pair.split("=") if isinstance(pair, str) else pair
            token, number = checks.whole_number("logit_bias", int(token), 0), float(number)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"`logit_bias` {pair!r} is no id with a number; write 17=-5, or 17=-inf to ban it"
            ) from None
        if not number < 1e30:  # with a logit it has to be a number in float32, too
            raise InputError(
                f"`logit_bias` of {token} is {number}; it must be a number below 1e30, or -inf"
            )
        found[token] = number
    return found or None


# What some orders read and others do not.
SETTINGS = ORDERS.words("reads")


def given_settings(values: Mapping[str, Any]) -> frozenset[str]:
    """Those settings that have a value."""
    return frozenset(name for name in SETTINGS if values.get(name) is not None)


def implied_sampler(given: Collection[str]) -> str:
    """The order that is meant where only settings are `given`; `InputError` where there is none."""
    if not given:
        return "first_hitting"
    for name in ORDERS:
        if set(given) <= set(ORDERS.words("reads", name)):
            return name
    raise InputError(f"no sampler reads {_listing(given)} together; leave some out")


def check_sampler(sampler: str, given: Collection[str]) -> None:
    """Raises `InputError` unless a sampler reads all settings `given`, and has what it needs."""
    name, reads = name_of(sampler), ORDERS.words("reads", sampler)
    for setting in sorted(set(given) - set(reads)):
        readers = [one for one in ORDERS if setting in ORDERS.words("reads", one)]
        raise InputError(
            f"the {name} sampler does not read `{setting}`: leave it out or use "
            f"{' or '.join(readers) or 'another sampler'}"
        )
    for setting in ORDERS.words("needs", sampler):
        if setting not in given:
            raise InputError(f"the {name} sampler cannot do without `{setting}`; give `{setting}`")
    if {"steps", "tokens_per_step"} <= set(given):
        raise InputError("`steps` and `tokens_per_step` both say how many tokens: leave one out")


def _listing(settings: Collection[str]) -> str:
    return " and ".join(f"`{name}`" for name in sorted(settings))


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
