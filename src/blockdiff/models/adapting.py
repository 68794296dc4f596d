"""From a causal language model to a block denoiser: its mask token and its record.

    blockdiff.adapt(lm)           a model in memory; weights are shared, not copied
    give_mask(lm, tokenizer)      a mask token, with a row in the model's tables
    with_record(lm, record, …)    a model under the record of its folder; a plain causal one is AR

`models.loading.adapt_folder` makes a folder of these.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from blockdiff.checks import whole_number, whole_numbers
from blockdiff.data.tokenizers import MASK_TOKEN
from blockdiff.errors import InputError, first_line
from blockdiff.models.adapted import RECORD, Adapted
from blockdiff.models.adapted_config import RECORDED, AdaptedConfig
from blockdiff.models.passes import Unsuitable
from blockdiff.models.pretrained import SAME
from blockdiff.models.probe import probe, require_interface
from blockdiff.printing import quiet_transformers

# A base model that does not say how many positions it knows.
DEFAULT_LENGTH = 2048


def adapt(
    lm: PreTrainedModel,
    *,
    mask_token_id: int,
    block_size: int | Sequence[int] = 8,
    prediction: Literal["shift", "same"] = "shift",
    clean: Literal["causal", "block"] = "causal",
    length: int | None = None,
    draft: int | None = None,
    chain_rank: int = 64,
) -> Adapted:
    """A causal language model of transformers as a denoiser of blocks of `block_size` tokens.

    `mask_token_id`: an id with a row in its embedding table. `prediction`: "shift" keeps the
    model's habit of predicting the next token; "same" makes the logits at i be for token i, which
    takes far longer to learn. `clean`: what a token of the clean text sees, everything before it
    ("causal", as the model was trained) or all of its block too ("block", the paper's). `length`:
    the context, by default what the model's configuration says. `draft`: the model stays what it
    is, and gets low-rank pairs of this rank that only noised tokens go through, with a chain of
    `chain_rank`; the objective `draft` trains them. The model's weights are used as they are, not
    copied; train it then.

    Raises `InputError` for a model that cannot be adapted, with the reason, for a mask token
    outside its vocabulary, and for a context or blocks longer than the model's own context.

    Example:
        >>> import torch, blockdiff
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> lm = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
        >>> blockdiff.adapt(lm, mask_token_id=19, block_size=4).config.kind
        'bd3lm'
    """
    sizes = whole_numbers("block_size", block_size)
    known = context_of(lm.config.get_text_config())
    ranks = {"draft": draft, "chain_rank": chain_rank} if draft is not None else {}
    ranks = {name: whole_number(name, rank, name == "draft") for name, rank in ranks.items()}
    if length is not None and whole_number("length", length) > known:
        raise InputError(f"`length` is {length}, but the model's context is {known} tokens")
    return wrap(
        lm,
        block_size=max(sizes), block_sizes=sizes, mask_token_id=mask_token_id,
        prediction=prediction, clean_stream=clean, length=known if length is None else length,
        draft_rank=ranks.get("draft", 0), chain_rank=ranks.get("chain_rank", 0),
    )  # fmt: skip


def wrap(lm: PreTrainedModel, **conventions: Any) -> Adapted:
    """The model under these fields of `AdaptedConfig`, after it was probed."""
    require_interface(lm)
    base = lm.config.get_text_config()
    config = AdaptedConfig(
        **{
            "vocab_size": len(_table(lm)),
            "hidden_size": base.hidden_size,
            "num_hidden_layers": base.num_hidden_layers,
            "bos_token_id": _one(base.bos_token_id),
            "eos_token_id": _one(base.eos_token_id),
            "length": context_of(base),
            **conventions,
        }
    )
    model = Adapted(config, lm)
    probe(model)
    return model.eval()


def as_autoregressive(lm: PreTrainedModel) -> Adapted:
    """A plain causal model as the AR model that it is; no id is its mask token."""
    return wrap(lm, causal=True, mask_token_id=len(_table(lm)))


def context_of(base: Any) -> int:
    """How many positions a base model knows."""
    length = getattr(base, "max_position_embeddings", None)
    length = DEFAULT_LENGTH if length is None else length
    rope = getattr(base, "rope_parameters", None) or {}
    for scaling in (rope, *rope.values()):  # one for all layers, or one for each kind of layer
        if isinstance(scaling, dict) and scaling.get("rope_type") in ("dynamic", "longrope"):
            # These turn by other angles once text is longer than this: what is cached would change.
            before = scaling.get("original_max_position_embeddings")
            length = length if before is None else min(length, before)
    return int(length)


def _one(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token


@torch.no_grad()
def give_mask(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token: str | None = None
) -> int:
    """The id of the mask token, with a row in the model's tables; the tokenizer has it as its mask.

    A new row is the mean of the input table, scaled to the length its rows have. Raises
    `InputError` for a mask token that text may hold, an ordinary word or one with another meaning,
    and for a tokenizer that has ids the model does not know.
    """
    name = mask_token or tokenizer.mask_token or MASK_TOKEN
    vocabulary, rows = tokenizer.get_vocab(), len(_table(lm))
    known = name in vocabulary
    named = tokenizer.special_tokens_map.items()
    roles = {token: role for role, token in named if isinstance(token, str)}
    if roles.get(name, "mask_token") != "mask_token":
        raise InputError(
            f"{name!r} is this tokenizer's {roles[name]}: choose another as `mask_token`"
        )
    if known and name not in roles and vocabulary[name] not in tokenizer.added_tokens_decoder:
        raise InputError(
            f"{name!r} is an ordinary token of this tokenizer, which text may hold: choose "
            "another as `mask_token`"
        )
    last = max((number for token, number in vocabulary.items() if token != name), default=-1)
    if last >= rows:
        raise InputError(
            f"the tokenizer's ids run up to {last}, but the model's vocabulary is of {rows}: it is "
            "not the model's tokenizer"
        )
    tokenizer.add_special_tokens({"mask_token": name})
    mask = cast(int, tokenizer.convert_tokens_to_ids(name))
    if mask < rows and known:
        return mask
    if mask >= rows:
        lm.resize_token_embeddings(mask + 1, mean_resizing=False)
    head = cast(nn.Linear, lm.get_output_embeddings()).weight
    tied = head.data_ptr() == _table(lm).data_ptr()
    for table in [_table(lm)] if tied else [_table(lm), head]:
        others = torch.cat([table[:mask], table[mask + 1 :]]).float()
        mean = others.mean(0)
        scale = others.norm(dim=1).mean() / mean.norm().clamp(min=1e-9)
        table[mask] = (mean * scale).to(table.dtype)
    return mask


def _table(lm: PreTrainedModel) -> Tensor:
    return cast(nn.Embedding, lm.get_input_embeddings()).weight


def open_adapted(
    folder: Path,
    raw: Mapping[str, Any],
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device_map: Any = None,
) -> Adapted:
    """The model in a folder of transformers: under its record, or without one as AR.

    `raw`: its config.json. Weights are read by transformers, which never runs code of the folder.
    """
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=re.escape(SAME))
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, device_map=device_map, trust_remote_code=False,
                use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:
        raise InputError(f"{folder} cannot be opened: {first_line(error)}") from None
    lm: PreTrainedModel = opened[0]
    for what, key in (("is missing", "missing_keys"), ("has another shape", "mismatched_keys")):
        if names := sorted(str(name) for name in opened[1][key]):
            raise InputError(
                f"{folder}: the weights do not fit config.json: {names[0]} {what} "
                f"({len(names)} such names in all)"
            )
    for name, tensor in lm.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{folder}: {name} holds numbers that are not finite")
    lm.config.__dict__.pop(RECORD, None)
    return with_record(lm, raw.get(RECORD), folder / f"config.json: {RECORD}")


def with_record(lm: PreTrainedModel, record: Mapping[str, Any] | None, where: Path) -> Adapted:
    """A model of transformers under a record, or without one as AR; `where` the record stands."""
    if record is None:
        return as_autoregressive(lm)
    try:
        if unknown := sorted(record.keys() - set(RECORDED)):
            raise InputError(f"nobody knows {unknown[0]!r}")
        return wrap(lm, **record)
    except Unsuitable:
        raise
    except (InputError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {first_line(error)}") from None


def is_causal_lm(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a causal language model of transformers."""
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
