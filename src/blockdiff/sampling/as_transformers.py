"""`model.generate` in transformers' words: a GenerationConfig in, ids out, a streamer on the way.

The rows are the engine's: the tokens are those of `blockdiff.generate` under the same options and
seed. What a GenerationConfig asks for and block diffusion has no such thing of (beams, an assistant
model, …) is refused where the caller asked, and told where a folder's generation_config.json did.

Shapes: B rows, P prompt, T prompt and text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from blockdiff.checks import SEEDS, real_number, whole_number
from blockdiff.errors import InputError
from blockdiff.registry import GENERATION
from blockdiff.sampling.defaults import (
    KEY,
    LENGTHS,
    ORDERING,
    options_for,
    stored_options,
    without,
)
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.guides import bound
from blockdiff.sampling.options import SamplingOptions, translated
from blockdiff.sampling.stopping import StopAtTokens

_OURS = frozenset(field.name for field in fields(SamplingOptions))
_THEIRS = {
    *("max_length", "do_sample", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("num_return_sequences", "return_dict_in_generate", "tokenizer"),
    *("guidance_scale", "sequence_bias", "no_repeat_ngram_size", "bad_words_ids"),
    *("suppress_tokens", "min_new_tokens", "prefix_allowed_tokens_fn"),
}
# How transformers computes, which is not how this package does: the text is the same.
_UNREAD = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache"),
    *("disable_compile", "compile_config", "synced_gpus", "prefill_chunk_size", "low_memory"),
    *("renormalize_logits", "remove_invalid_values", "early_stopping", "length_penalty"),
    *("transformers_version", "trust_remote_code", "token_type_ids", "position_ids"),
}
# Arguments of transformers' `generate` that are no settings.
_ARGUMENTS = {
    *("stopping_criteria", "custom_generate"),
    *("assistant_model", "assistant_tokenizer", "inputs_embeds"),
    *("negative_prompt_ids", "negative_prompt_attention_mask"),
}
# Settings that change nothing at 1.
_NEUTRAL_AT_ONE = {
    *("num_beams", "num_beam_groups", "encoder_repetition_penalty", "typical_p", "top_h"),
}

# What a pipeline of some versions fills a configuration up with.
_DEFAULTS: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()


class _AsTransformers:
    """What the registry knows as `transformers`."""

    name = "transformers"

    @staticmethod
    @torch.no_grad()
    def generate(
        model: Any,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        generation_config: GenerationConfig | None,
        given: Mapping[str, Any],
        streamer: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """See `DenoiserModel.generate`."""
        try:
            return _generate(
                model,
                input_ids,
                attention_mask,
                _settings(model, generation_config, given),
                streamer,
            )
        finally:  # who reads it in another thread waits for its end, whatever happened here
            if streamer is not None:
                streamer.end()


def _generate(
    model: Any, input_ids: Any, attention_mask: Tensor | None, wish: dict[str, Any], streamer: Any
) -> Tensor | GenerateDecoderOnlyOutput:
    config = model.config
    input_ids = _first_ids(model, input_ids, wish)
    ends = wish.get("eos_token_id", config.eos_token_id)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pad = wish.get("pad_token_id")
    shown = pad not in {*ends, wish.get("bos_token_id", config.bos_token_id)}
    prompts = _prompts(input_ids, attention_mask, pad if shown else None)
    copies = whole_number("num_return_sequences", wish.get("num_return_sequences", 1))
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    if streamer is not None and len(prompts) > 1:
        raise InputError("a streamer shows one text: give one prompt and no copies of it")
    options = _options(wish, input_ids.shape[1], ends)
    processors = _processors(wish, prompts, sorted(ends))
    if processors:  # theirs come first, in their order
        if options.repetition_penalty is not None:
            processors.insert(
                bool(wish.get("sequence_bias")),
                RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            )
        calls = options.logits_processor or []
        calls = calls if isinstance(calls, list | tuple) else [calls]
        options = replace(options, logits_processor=[*processors, *calls], repetition_penalty=None)
    options = bound(options, model, wish.get("tokenizer"), ends)
    texts = _write(model, prompts, options, streamer)
    pad = next(token for token in (pad, config.eos_token_id, *ends, 0) if token is not None)
    longest = max(map(len, texts))
    new = torch.tensor([text + [pad] * (longest - len(text)) for text in texts])
    sequences = torch.cat([input_ids.repeat_interleave(copies, 0), new.to(input_ids)], 1)
    if wish.get("return_dict_in_generate"):
        return GenerateDecoderOnlyOutput(sequences=cast(LongTensor, sequences))
    return sequences


def _settings(
    model: Any, config: GenerationConfig | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All that is said: by the caller, else by the folder; what means nothing here is left out."""
    if not isinstance(config, GenerationConfig | None):
        raise InputError(f"`generation_config` is {type(config).__name__}, not a GenerationConfig")
    given = translated({name: value for name, value in given.items() if value is not None})
    if given.keys() >= LENGTHS:
        raise InputError("`max_new_tokens` and `max_length` were both given; leave one out")
    told = {} if config is None else translated(_flat(config))
    if told.keys() >= LENGTHS:  # a pipeline's own; the first is what it means
        del told["max_length"]
    told = without(told, given) | given
    # What the folder's own key cannot mean is refused with the file's name.
    options_for(model, {name: value for name, value in told.items() if name in ORDERING})
    own = without(_flat(model.generation_config, folder=True), told)
    if told.get("do_sample") and own.get("temperature") == 0:
        del own["temperature"]
    known = _OURS | _THEIRS | _UNREAD | _ARGUMENTS | GenerationConfig().to_dict().keys()
    for name in told.keys() - known:
        raise InputError(
            f"`generate` has no option `{name}`; it reads {', '.join(sorted(_OURS | _THEIRS))}"
        )
    for name, value in told.items():
        if _asks(name, value):
            shown = f" {value!r}" if isinstance(value, int | float | str) else ""
            raise InputError(f"a text written in blocks has no `{name}`{shown}; leave it out")
    for name, value in own.items():
        if _asks(name, value):
            warnings.warn(f"generation_config.json: {name} {value!r} is not read", stacklevel=4)
    return {name: value for name, value in (own | told).items() if name in _OURS | _THEIRS}


def _flat(config: GenerationConfig, folder: bool = False) -> dict[str, Any]:
    """All that a configuration says, what stands under our own key before the rest.

    In a `folder`'s, other words for an order are ours only where a sampler is named among them:
    what others call steps may be those of the whole text.
    """
    said = {name: value for name, value in config.to_diff_dict().items() if name != KEY}
    if folder and "sampler" not in said:
        said = {name: value for name, value in said.items() if name not in ORDERING}
    own = stored_options(config)
    if "temperature" in own:
        said.pop("do_sample", None)
    return without(said, own) | own


def _asks(name: str, value: Any) -> bool:
    """Whether a setting that is not read asks for something."""
    if value == _DEFAULTS.get(name):
        return False
    if name in _OURS | _THEIRS | _UNREAD or name.startswith("_"):
        return False
    if isinstance(value, int | float):
        return bool(value) and not (value == 1 and name in _NEUTRAL_AT_ONE)
    return value is not None and not (isinstance(value, list | tuple | dict | str) and not value)


def _first_ids(model: Any, input_ids: Any, wish: Mapping[str, Any]) -> Tensor:
    """The prompts as int64 [B, P]; without any, the token a text begins with."""
    if input_ids is None:
        first = wish.get("bos_token_id", model.config.bos_token_id)
        if first is None:
            raise InputError("there is no token to begin a text with; give `input_ids`")
        input_ids = torch.tensor([[first]], device=model.device)
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        what = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"`input_ids` is {what}; it must be a tensor of ids [batch, tokens]")
    return input_ids


def _prompts(
    input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None
) -> list[list[int]]:
    """The ids of each row without the padding on its left."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        if pad_token_id is not None:
            attention_mask -= (input_ids == pad_token_id).cumprod(1)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"`attention_mask` is {list(attention_mask.shape)}, `input_ids` {list(input_ids.shape)}"
        )
    if bool((attention_mask.diff(dim=1) < 0).any()):
        raise InputError(
            "`attention_mask` has padding behind or inside a prompt; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    rows = zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)
    return [[token for token, there in zip(*row, strict=True) if there] for row in rows]


def _options(wish: Mapping[str, Any], prompt: int, ends: set[int]) -> SamplingOptions:
    """The package's own options of what was said in transformers' words."""
    own = {name: value for name, value in wish.items() if name in _OURS}
    if own.get("logits_processor") in ([], ()):  # what its pipelines give
        del own["logits_processor"]
    if "max_length" in wish and "max_new_tokens" not in wish:
        longest = whole_number("max_length", wish["max_length"])
        if longest <= prompt:
            raise InputError(
                f"`max_length` {longest} counts the prompt, which has {prompt} tokens already; "
                "raise it, or give `max_new_tokens`"
            )
        own["max_new_tokens"] = longest - prompt
    if wish.get("do_sample") is False:
        own["temperature"] = 0.0
        own = {name: value for name, value in own.items() if name not in ("top_k", "top_p")}
    if own.get("top_k") == 0:  # transformers' word for all of them
        del own["top_k"]
    if own.get("stop", "eos") == "eos":
        own["stop"] = [StopAtTokens(frozenset(ends))] if ends else ["none"]
    if (guidance := wish.get("guidance_scale")) is not None:
        if "cfg_scale" in own:
            raise InputError("`guidance_scale` and `cfg_scale` were both given; leave one out")
        # Theirs is s + 1: un + g·(cond − un), off at 1.
        own["cfg_scale"] = real_number("guidance_scale", guidance, 1, 1e6) - 1
    if own.get("temperature") == 0:  # the same text every time: the order is drawn, too
        own.setdefault("seed", 0)
    elif "seed" not in own:
        own["seed"] = int(torch.randint(SEEDS[1], ()))
    return SamplingOptions(**own)


def _processors(
    wish: Mapping[str, Any], prompts: list[list[int]], ends: list[int]
) -> list[Callable[..., Tensor]]:
    """transformers' own processors for what its words ask for, in its order."""
    found: list[Callable[..., Tensor]] = []
    if bias := wish.get("sequence_bias"):
        found.append(SequenceBiasLogitsProcessor(bias))
    if size := wish.get("no_repeat_ngram_size"):
        found.append(NoRepeatNGramLogitsProcessor(size))
    if words := wish.get("bad_words_ids"):
        found.append(NoBadWordsLogitsProcessor(words, ends or None))
    if (least := wish.get("min_new_tokens")) and ends:
        starts = set(map(len, prompts))
        if len(starts) > 1:
            raise InputError("`min_new_tokens` takes prompts of one length; write them one by one")
        found.append(MinNewTokensLengthLogitsProcessor(starts.pop(), least, ends))
    if allowed := wish.get("prefix_allowed_tokens_fn"):
        if len(prompts) > 1:
            raise InputError(
                "`prefix_allowed_tokens_fn` is told which row it is asked of: give one prompt and "
                "no copies of it"
            )
        found.append(PrefixConstrainedLogitsProcessor(allowed, 1))
    if tokens := wish.get("suppress_tokens"):
        found.append(SuppressTokensLogitsProcessor(tokens))
    return found


def _write(
    model: Any, prompts: list[list[int]], options: SamplingOptions, streamer: Any
) -> list[list[int]]:
    """The new ids of each row; the streamer of the only one is told on the way."""
    steps, known, last = stream_tokens(model, prompts, options), len(prompts[0]), None
    if streamer is not None:
        streamer.put(torch.tensor(prompts))
    for last in steps:
        if streamer is not None:
            length, end = int(last.lengths[0]), len(prompts[0]) + options.max_new_tokens
            text = last.tokens[0, : end if length < 0 else length].tolist()
            final = known + len(last.final(0, known, model.config.mask_token_id))
            _show(streamer, text[known:final], text[final:])
            known = final
    assert last is not None
    ends = zip(map(len, prompts), last.lengths.tolist(), strict=True)
    return [last.tokens[row, start:end].tolist() for row, (start, end) in enumerate(ends)]


def _show(streamer: Any, new: list[int], draft: list[int]) -> None:
    if new:
        streamer.put(torch.tensor(new))
    if draft and hasattr(streamer, "put_draft"):
        streamer.put_draft(torch.tensor([draft]))


GENERATION.register(_AsTransformers())
