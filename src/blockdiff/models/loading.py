"""A model together with the tokenizer that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockdiff import folders
from blockdiff.data.tokenizers import (
    MASK_TOKEN,
    add_mask_token,
    bos_id,
    eos_id,
    fingerprint,
    load_tokenizer,
    read_tokenizer,
)
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.models.adapted import Adapted
from blockdiff.models.adapting import adapt, give_mask
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.hub import DeviceMap, Dtype, load_model, resolve, save_model, stored_mask
from blockdiff.models.ngrams import Table
from blockdiff.models.pretrained import DenoiserModel
from blockdiff.models.tensors import require_memory
from blockdiff.models.weights import convert, resolve_precision


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: Dtype = torch.float32,
    device: str | torch.device = "auto",
    mask_token_id: int | None = None,
    block_size: int | None = None,
    device_map: DeviceMap = None,
) -> tuple[DenoiserModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder or hub id, or `starter`, which comes with the package.

    `tokenizer` names another place for the tokenizer: some released checkpoints come without one
    (the OpenWebText models use GPT-2's). `device`: as on the command line, by default CUDA where
    there is one, else MPS, else the CPU; left to `device_map` where that is given. The others are
    those of `load_model`. Raises `InputError` when either is missing, they do not fit, or the
    machine has no such device.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> tokenizer.mask_token
        '<|mask|>'
    """
    chosen = None if device_map is not None else choose_device(device)
    folder = resolve(source)
    model = load_model(
        folder, dtype=dtype, mask_token_id=mask_token_id, block_size=block_size,
        device_map=device_map,
    )  # fmt: skip
    if chosen is not None and chosen != model.device:
        numbers = sum(parameter.numel() for parameter in model.parameters())
        require_memory(numbers, model.dtype, folder, [chosen])
        model.to(device=chosen)
    has_own = (folder / "tokenizer_config.json").is_file()
    if tokenizer is None and not has_own:
        raise InputError(f"{source} has no tokenizer; name one with `tokenizer`, for example gpt2")
    loaded = read_tokenizer(folder if tokenizer is None else tokenizer)
    if has_own and tokenizer is not None:
        require_own(add_mask_token(read_tokenizer(tokenizer)), folder)
    mask = model.config.mask_token_id
    if mask < model.config.vocab_size:  # else it has none
        named = getattr(model, "names_mask", True)
        mark_mask(loaded, mask if named else None, always=mask_token_id is not None)
    settle_mask(model, loaded)
    check_tokenizer(model, loaded)
    model.drawable = drawable(loaded, model.config.vocab_size)
    model.draft_table = Table.read(folder, model.config.vocab_size)
    if model.config.eos_token_id is None:
        model.config.eos_token_id = loaded.eos_token_id
    return model, loaded


def load_in(
    source: str | Path, precision: str, device: str | torch.device | None = "auto", *,
    few_tokens: bool = False, **how: Any,
) -> tuple[DenoiserModel, PreTrainedTokenizerBase, str]:  # fmt: skip
    """What `load` gives, for inference in a precision of `weights.WEIGHTS`, and that precision.

    "auto" becomes what the device is made for. Weights that are used in bf16 are read in it, so no
    more has to fit into memory. `few_tokens`: as `convert` has it; `how`: as for `load`.
    """
    chosen = choose_device(device)
    precision = resolve_precision(precision, chosen)
    if precision == "bf16":
        how["dtype"] = torch.bfloat16
    try:
        model, tokenizer = load(source, device=chosen, **how)
    except InputError as error:  # of weights that would fit in bf16
        raise InputError(str(error).replace("give `dtype`", "give `precision`")) from None
    convert(model, precision, chosen, few_tokens=few_tokens)
    if precision == "float32" and model.dtype == torch.bfloat16:
        precision = "bf16"  # as its weights were read
    return model, tokenizer, precision


def mark_mask(
    tokenizer: PreTrainedTokenizerBase,
    mask: int | None,
    mask_token: str = MASK_TOKEN,
    *,
    always: bool = False,
) -> PreTrainedTokenizerBase:
    """Gives a tokenizer without a mask token that with the id `mask`, or a new one; returns it.

    Released tokenizers often have the token without saying that it is the mask. `always`: also
    where the tokenizer has another.
    """
    if mask is not None and (tokenizer.mask_token is None or always):
        token = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
        if token is not None:
            tokenizer.add_special_tokens({"mask_token": token})
    return add_mask_token(tokenizer, mask_token)


def load_tokenizer_of(source: str | Path, mask_token: str = MASK_TOKEN) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder or hub repository, with the model's mask token.

    `mask_token`: what is added where neither model nor tokenizer has one.
    """
    return mark_mask(read_tokenizer(source), stored_mask(resolve(source)), mask_token)


def end_ids(model: Any) -> frozenset[int]:
    """The ids that end a text by a model's own configurations, those for generating included."""
    found: set[int] = set()
    for part in (model, getattr(model, "lm", None)):  # an adapted one's base model has its own
        for config in (getattr(part, "config", None), getattr(part, "generation_config", None)):
            ends = getattr(config, "eos_token_id", None)
            found |= {ends} if isinstance(ends, int) else set(ends or ())
    return frozenset(found)


def settle_mask(model: DenoiserModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model whose config.json does not name its mask token the tokenizer's.

    Released configurations leave it to the tokenizer: 103 of BERT's, one behind all of GPT-2's.
    """
    mask = tokenizer.mask_token_id
    named = getattr(model, "names_mask", True)
    if not named and mask is not None and mask < model.config.vocab_size:
        model.config.mask_token_id = mask


def require_own(
    tokenizer: PreTrainedTokenizerBase, folder: str | Path, mask_token: str = MASK_TOKEN
) -> None:
    """Raises `InputError` unless the tokenizer gives the ids that the folder's own gives.

    `mask_token`: what the folder's own is given as its mask, where it has none.
    """
    if fingerprint(tokenizer) != fingerprint(load_tokenizer(folder, mask_token)):
        raise InputError(
            f"the tokenizer is not the one {folder} was trained with; leave `tokenizer` out to use "
            "the model's own"
        )


def drawable(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """bool [V]: which ids of a vocabulary (often padded to a round size) have a token."""
    there = torch.zeros(vocab_size, dtype=torch.bool)
    there[sorted(set(tokenizer.get_vocab().values()))] = True
    return there


def check_tokenizer(model: Denoiser, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `InputError` unless the tokenizer's ids fit the model's vocabulary and mask."""
    size, known = len(tokenizer), model.config.vocab_size
    if size > known:
        raise InputError(
            f"the tokenizer has {size} tokens but the model knows {known}; use the model's own"
        )
    if not model.config.causal and tokenizer.mask_token_id != model.config.mask_token_id:
        raise InputError(
            f"the tokenizer's mask token has id {tokenizer.mask_token_id} but the model's is "
            f"{model.config.mask_token_id}; use the model's own tokenizer"
        )


def adapt_folder(
    source: str | Path,
    out: str | Path,
    *,
    block_size: int | Sequence[int] = 8,
    prediction: Literal["shift", "same"] = "shift",
    clean: Literal["causal", "block"] = "causal",
    draft: int | None = None,
    chain_rank: int = 64,
    mask_token: str | None = None,
    dtype: Literal["auto", "float32", "bf16"] = "auto",
    overwrite: bool = False,
) -> Adapted:
    """Adapts the model in a folder or hub repository and saves it, with its tokenizer, in `out`.

    The mask token is `mask_token`, else the tokenizer's own, else `<|mask|>`; one that the
    tokenizer does not know is added to it, and a row to the model's tables. `draft`: the rank of
    pairs that only noised tokens go through, with a chain of `chain_rank` (`models.gated`). Raises
    `InputError` before `out` is touched.
    """
    folder = resolve(source)
    if folder.resolve() == folders.local_path("out", out).resolve():
        raise InputError("`out` is the folder of the model itself; choose another")
    with folders.claim(out, overwrite=overwrite, kinds=("model", "tokenizer")) as target:
        tokenizer = read_tokenizer(folder)
        kinds: dict[str, Any] = {"float32": torch.float32, "bf16": torch.bfloat16}
        before = load_model(folder, dtype=kinds.get(dtype, "auto"))
        if not isinstance(before, Adapted):
            raise InputError(f"{source} is no causal language model of transformers")
        if not before.config.causal:
            raise InputError(f"{source} is a block diffusion model already: train it")
        lm = before.lm
        mask = give_mask(lm, tokenizer, mask_token)
        model = adapt(
            lm, mask_token_id=mask, block_size=block_size, prediction=prediction, clean=clean,
            draft=draft, chain_rank=chain_rank,
        )  # fmt: skip
        model.config.bos_token_id, model.config.eos_token_id = bos_id(tokenizer), eos_id(tokenizer)
        folders.clear(target, kinds=("model", "tokenizer"))
        save_model(model, target, tokenizer)
    return model
