"""lm-evaluation-harness: `lm_eval --model blockdiff --model_args pretrained=FOLDER,draws=16`.

Scores are those of `score.py`: exact for AR models and by `enumerate` up to L' = 4, otherwise the
mean of unbiased draws. The harness keeps one number an answer; a `LogLikelihood` is that number
with its standard error, which the sample log shows behind a ±. A bound is on −log p, so block
diffusion's perplexities are upper bounds, and so is every score of a choice.

lm_eval finds this class by the entry point `lm_eval.models`; see `lm_eval_blockdiff.py`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from blockdiff.data.tokenizers import bos_id
from blockdiff.device import choose_device
from blockdiff.errors import InputError, first_line
from blockdiff.evaluation.corpus import open_to_measure
from blockdiff.evaluation.harness_options import generation_options, read_arguments
from blockdiff.evaluation.likelihood import tokens_per_pass
from blockdiff.evaluation.score import Score, address, score_tokens
from blockdiff.models.loading import end_ids
from blockdiff.progress import advance
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions, stop_parts
from blockdiff.sampling.prompts import continuation, encode, encode_pair
from blockdiff.sampling.stopping import StopAtText, StopAtTokens

log = logging.getLogger(__name__)


class LogLikelihood(float):
    """A log-likelihood in nats, and in `error` its standard error by the masks that were drawn.

    Example:
        >>> from blockdiff.evaluation.harness import LogLikelihood
        >>> print(LogLikelihood(-2.5), LogLikelihood(-2.5, 0.125))
        -2.5 -2.5 ± 0.125
    """

    error: float

    def __new__(cls, value: float, error: float = 0.0) -> LogLikelihood:
        made = super().__new__(cls, value)
        made.error = error
        return made

    def __reduce__(self) -> tuple[type[LogLikelihood], tuple[float, float]]:
        return LogLikelihood, (float(self), self.error)

    def __str__(self) -> str:
        return f"{float(self)}" + (f" ± {self.error:.3g}" if self.error != 0 else "")


@register_model("blockdiff")
class BlockDiffusionLM(LM):
    """A model of this package, or one that it opens, to lm-evaluation-harness."""

    def __init__(self, max_batch_size: int | None = None, **given: Any) -> None:
        """`given`: what `read_arguments` takes; `max_batch_size` is the harness's and not used."""
        super().__init__()
        self.options, self.sampling = read_arguments(given)
        device = self.options.device
        if device.startswith("cuda") and choose_device("auto").type != "cuda":
            device = "auto"  # lm_eval says cuda:0 where it was told nothing
        self.model, self.tokenizer, self.precision = open_to_measure(
            self.options.pretrained, self.options, device, block_size=self.options.block_size
        )
        config, size = self.model.config, self.options.block_size
        # L' = 1 of a model under prediction "shift" is the causal model that it was.
        known = (*config.block_sizes, *([1] if config.prediction == "shift" else []))
        if size is not None and not config.causal and size not in known:
            log.warning("%s was trained with L' = %s, not %d", self.options.pretrained,
                        ", ".join(map(str, config.block_sizes)), size)  # fmt: skip
        self.max_length = min(self.options.max_length or config.length, config.length)
        self._device = self.model.device
        self._errors: list[float] = []
        self._cut = 0

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> BlockDiffusionLM:
        """What `model_args` says comes before lm_eval's own `--device` and `--batch_size`."""
        program = Path(sys.argv[0])
        if "lm_eval" in (program.name.replace("-", "_"), program.parent.name):  # not from Python
            sys.excepthook = partial(_tell, sys.excepthook)
        return cls(**{**(additional_config or {}), **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> BlockDiffusionLM:
        """The same of "pretrained=FOLDER,draws=16"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[LogLikelihood, bool]]:
        """Of each continuation after its context, and whether greedy decoding writes it.

        The end of what is longer than `max_length` is measured. Raises `InputError` for a
        continuation that is as long.
        """
        pairs = [self._pair(*request.args[:2]) for request in requests]
        scored = [i for i, (_, after) in enumerate(pairs) if after]
        self._note_cut(sum(len(a) + len(b) > self.max_length for a, b in pairs))
        found = self._score([pairs[i] for i in scored], "answers", greedy=True)
        results = [(LogLikelihood(0.0), True)] * len(requests)  # of nothing
        for i, score in zip(scored, found, strict=True):
            self._errors.append(score.error)
            results[i] = LogLikelihood(-score.nats, score.error), bool(score.greedy)
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[LogLikelihood]:
        """Of each whole text, after the beginning-of-text token.

        A text longer than the context is measured in windows, each token once: the first holds as
        many tokens as fit, each further one the tokens after those, read after one token, the last
        after as many as fit.
        """
        windows, owner = [], []
        first = bos_id(self.tokenizer)
        if first is None:
            raise InputError("the tokenizer has no token to begin a text with: no text is measured")
        for number, request in enumerate(requests):
            ids = encode(self.model, self._bare(request.args[0]), self.tokenizer)[1:]
            for window in get_rolling_token_windows(ids, first, self.max_length - 1, 1):
                windows.append(make_disjoint_window(window))
                owner.append(number)
        totals = [[0.0, 0.0] for _ in requests]
        found = self._score(windows, "windows", greedy=False)
        for number, score in zip(owner, found, strict=True):
            totals[number][0] -= score.nats
            totals[number][1] += score.error**2
        self._errors += [math.sqrt(variance) for _, variance in totals]
        return [LogLikelihood(value, math.sqrt(variance)) for value, variance in totals]

    def _pair(self, context: str, after: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.model, self._bare(context), after, self.tokenizer)

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], unit: str, *, greedy: bool
    ) -> list[Score]:
        if not pairs:
            return []
        rows = []
        for number, (before, after) in enumerate(pairs, start=1):
            room = self.max_length - len(after)
            if room < 1:
                raise InputError(
                    f"continuation {number} has {len(after)} tokens: with one before it that is "
                    f"more than the {self.max_length} that are read"
                )
            rows.append((before[-room:], after))
        with advance(f"{self.options.pretrained} reads {len(rows)} {unit}", len(rows), unit) as say:
            return score_tokens(
                self.model, [row[0] for row in rows], [row[1] for row in rows], greedy=greedy,
                estimator=self.options.estimator, draws=self.options.draws,
                timesteps=self.options.timesteps, seed=self.options.seed,
                batch_size=self.options.batch_size, progress=say,
            )  # fmt: skip

    # text

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text after each context, up to what its task says ends it.

        A task's own settings come before those of `model_args`, and one that is not sampled is
        greedy. Raises `InputError` for settings that no sampler here reads.
        """
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        prompts: list[list[int]] = []
        wishes: dict[str, tuple[SamplingOptions, list[str]]] = {}
        for i, request in enumerate(requests):
            context, wish = request.args[:2]
            key = json.dumps(wish, sort_keys=True, default=str)
            if key not in wishes:
                wishes[key] = generation_options(wish, self.sampling)
            new = wishes[key][0].max_new_tokens
            # A long answer leaves half of the context to the prompt.
            room = self.max_length - min(new, self.max_length // 2)
            prompt = encode(self.model, self._bare(context), self.tokenizer)
            self._note_cut(len(prompt) > room)
            prompts.append(prompt[-room:])
            if not self.model.config.slides or self.model.config.kind == "sedd":
                new = min(new, self.max_length - len(prompts[-1]))
            groups[key, new].append(i)
        # A prompt that is asked for several times has as many answers.
        seen: Counter[int] = Counter()
        numbers = []
        for prompt in prompts:
            number = address(prompt)
            numbers.append((number + seen[number]) % 2**31)
            seen[number] += 1
        texts = [""] * len(requests)
        label = f"{self.options.pretrained} writes {len(requests)} texts"
        with advance(label, len(requests), "texts") as done:
            for (key, new), members in groups.items():
                options, until = wishes[key]
                options = replace(self._stopping(options, until), max_new_tokens=new)
                size = self.options.batch_size
                if size is None:
                    size = max(1, tokens_per_pass(self.model) // (2 * self.max_length))
                for start in range(0, len(members), size):
                    part = members[start : start + size]
                    found = generate_tokens(
                        self.model, [prompts[i] for i in part], options, [numbers[i] for i in part]
                    )
                    for i, tokens in zip(part, found.tokens, strict=True):
                        text = continuation(self.tokenizer, prompts[i], tokens)
                        texts[i] = text[: min((text.find(u) for u in until if u in text),
                                              default=len(text))]  # fmt: skip
                    done(len(part))
        return texts

    def _stopping(self, options: SamplingOptions, until: Sequence[str]) -> SamplingOptions:
        """`options` that also end at the texts `until`, special tokens or not."""
        special: dict[str, Any] = {
            one: self.tokenizer.convert_tokens_to_ids(one)
            for one in until
            if one in self.tokenizer.all_special_tokens
        }
        words = tuple(one for one in until if one not in special)
        rules: list[Any] = list(stop_parts(options.stop))
        rules.append(StopAtTokens(end_ids(self.model) | frozenset(special.values())))
        if words:
            decode: Callable[[list[int]], str] = partial(continuation, self.tokenizer, [])
            rules.append(StopAtText(words, decode))
        return replace(options, stop=rules)

    # conversations

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text; raises `InputError` where the tokenizer has no template."""
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.options.pretrained} has no chat template: leave `apply_chat_template` out"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip
        except (TemplateError, ValueError) as error:
            raise InputError(f"the chat template refuses this task: {first_line(error)}") from None
        return str(text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` writes by, None where it is not asked for."""
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # what the harness's record says of the model

    @property
    def eot_token_id(self) -> int | None:
        return self.model.config.eos_token_id

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the results' `config`; of the standard errors the mean and the largest."""
        config, errors = self.model.config, [e for e in self._errors if math.isfinite(e)]
        exact = config.causal or config.block_size == 1  # which is one order of the tokens
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_precision": self.precision,
            "model_kind": config.kind,
            "model_block_size": None if config.causal else config.block_size,
            "max_length": self.max_length,
            "estimator": "exact" if config.causal else self.options.estimator,
            "draws": self.options.draws,
            "likelihood_is": "exact" if exact else "a lower bound on log p",
            "likelihood_stderr_mean": sum(errors) / len(errors) if errors else None,
            "likelihood_stderr_max": max(errors, default=None),
            "left_truncated": self._cut,
        }

    def _bare(self, text: str) -> str:
        """A text without the beginning-of-text token that templates write and we add."""
        first = bos_id(self.tokenizer)
        return text if first is None else text.removeprefix(str(self.tokenizer.decode([first])))

    def _note_cut(self, count: int) -> None:
        if count and not self._cut:
            log.warning(
                "%s: texts longer than %d tokens are read from their end on (left_truncated in the "
                "results says how many)", self.options.pretrained, self.max_length,
            )  # fmt: skip
        self._cut += count


def _tell(others: Callable[..., Any], kind: type[BaseException], error: Any, trace: Any) -> None:
    """Prints bad input as the line that it is, without the way through the harness."""
    if not isinstance(error, InputError):
        return others(kind, error, trace)
    print(f"blockdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
