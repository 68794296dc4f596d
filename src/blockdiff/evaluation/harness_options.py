"""What lm-evaluation-harness may say to a model: `--model_args`, and a task's generation_kwargs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision
from blockdiff.registry import BoundName
from blockdiff.sampling.options import SamplingOptions, translated

# What a task may call the number of new tokens, the first that is there counts; and the harness's
# own number where it says none.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_NEW_TOKENS = 256
# What the harness calls number formats.
_DTYPES = {"float32": "float32", "float": "float32", "bfloat16": "bf16", "bf16": "bf16",
           "int8": "int8", "auto": "auto"}  # fmt: skip


@dataclass(frozen=True)
class HarnessOptions:
    """What `--model_args` takes beside the fields of `SamplingOptions`.

    Attributes:
        pretrained: Model folder or hub id; starter is the one that comes with the package.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        block_size: Block size L' to measure and sample with; the model's own when left out.
        estimator: What bounds the likelihood: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per answer, where masks are not enumerated.
        timesteps: Time steps T of d3pm.
        seed: Seed of the masks, and of what is sampled.
        precision: Weights: float32, bf16, int8, or auto (bf16 where the processor is made for it).
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
        batch_size: Answers per pass; auto chooses by size. No score depends on it (float32).
        max_length: Tokens of a text that are read, its last ones; the model's context when left
            out.
    """

    pretrained: str
    tokenizer: str | None = None
    block_size: int | None = None
    estimator: BoundName = "auto"
    draws: int = 8
    timesteps: int = 1000
    seed: int = 0
    precision: Precision = "float32"
    device: str = "auto"
    batch_size: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers and names that cannot be meant."""
        checks.options(self, {"max_length": (2, checks.LARGEST_SIZE)}, {})


def read_arguments(given: Mapping[str, Any]) -> tuple[HarnessOptions, SamplingOptions]:
    """What `--model_args` says; raises `InputError`, in one line, for what cannot be meant.

    Example:
        >>> from blockdiff.evaluation.harness_options import read_arguments
        >>> options, sampling = read_arguments({"pretrained": "starter", "top_p": 0.9, "seed": 1})
        >>> options.seed, sampling.seed, sampling.top_p
        (1, 1, 0.9)
    """
    wish = {name: value for name, value in given.items() if value is not None}
    if "dtype" in wish:
        name = str(wish.pop("dtype")).removeprefix("torch.")
        checks.one_of("dtype", name, _DTYPES)
        if wish.setdefault("precision", _DTYPES[name]) != _DTYPES[name]:
            raise InputError("`dtype` and `precision` say different things; give one of them")
    size = wish.get("batch_size")
    if isinstance(size, str):
        if size.partition(":")[0] == "auto":
            del wish["batch_size"]
        elif size.isdecimal():
            wish["batch_size"] = int(size)
        else:
            raise InputError(f"`batch_size` is {size!r}; it must be a whole number, or auto")
    wish = translated(wish)
    own = {field.name: field for field in fields(HarnessOptions)}
    sampling = [field.name for field in fields(SamplingOptions) if field.name != "max_new_tokens"]
    for name in wish.keys() - own.keys() - set(sampling):
        known = ", ".join(dict.fromkeys([*own, "dtype", *sampling]))
        raise InputError(f"there is no model argument {name!r}; there are {known}")
    if "pretrained" not in wish:
        raise InputError("`pretrained` is missing: name a model folder, pretrained=FOLDER")
    # The harness reads a folder that is called 7 as a number.
    texts = {n for n, field in own.items() if str(field.type) in ("str", "str | None")}
    mine: dict[str, Any] = {n: str(v) if n in texts else v for n, v in wish.items() if n in own}
    options = HarnessOptions(**mine)
    return options, SamplingOptions(**{n: v for n, v in wish.items() if n in sampling})


def generation_options(
    wish: Mapping[str, Any], base: SamplingOptions
) -> tuple[SamplingOptions, list[str]]:
    """A task's `generation_kwargs`: `base` with its settings, and the texts that end an answer.

    As in the harness, an answer is greedy unless `do_sample` or a temperature above 0 says
    otherwise. Raises `InputError` for a setting that is none of `SamplingOptions`.

    Example:
        >>> from blockdiff import SamplingOptions
        >>> from blockdiff.evaluation.harness_options import generation_options
        >>> task = {"until": ["Q:"], "max_gen_toks": 8, "do_sample": False}
        >>> options, until = generation_options(task, SamplingOptions(temperature=0.7))
        >>> options.max_new_tokens, options.temperature, until
        (8, 0.0, ['Q:'])
    """
    given = {name: value for name, value in wish.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(one, str) for one in until):
        raise InputError(f"`until` is {until!r}; it must be a text, or a list of texts")
    sizes = [given.pop(name) for name in NEW_TOKENS if name in given]
    sample = given.pop("do_sample", None)
    if sample is None:
        sample = given.get("temperature", 0) > 0
    elif not isinstance(sample, bool):
        raise InputError(f"`do_sample` is {sample!r}; it must be true or false")
    if not sample:
        given["temperature"] = 0.0
    given = translated(given)
    known = [field.name for field in fields(SamplingOptions)]
    for name in given.keys() - set(known):
        raise InputError(
            f"the task asks for {name!r} in generation_kwargs, which no sampler here reads; there "
            f"are until, do_sample, {', '.join([NEW_TOKENS[0], *known])}"
        )
    if "sampler" in given:  # a task's order has none of another's settings
        base = replace(SamplingOptions(), temperature=base.temperature, seed=base.seed)
    changes = {**given, "max_new_tokens": sizes[0] if sizes else DEFAULT_NEW_TOKENS}
    return replace(base, **changes), [one for one in until if one]
