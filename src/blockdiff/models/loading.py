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
from blockdiff.models.dit import DiT
from blockdiff.models.hub import load_model, resolve, save_model


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "auto",
) -> tuple[DiT, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder or hub id, or `starter`, which comes with the package.

    `tokenizer` names another place for the tokenizer: released checkpoints come without one (the
    OpenWebText models use GPT-2's). `device`: as on the command line, by default CUDA where there
    is one, else MPS, else the CPU. Raises `InputError` when either is missing, they do not fit, or
    the machine has no such device.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> tokenizer.mask_token
        '<|mask|>'
    """
    chosen = choose_device(device)
    folder = resolve(source)
    model = load_model(folder, dtype=dtype)
    model.to(device=chosen)
    has_own = (folder / "tokenizer_config.json").is_file()
    if tokenizer is None and not has_own:
        raise InputError(f"{source} has no tokenizer; name one with `tokenizer`, for example gpt2")
    loaded = read_tokenizer(folder if tokenizer is None else tokenizer)
    if model.config.mask_token_id < model.config.vocab_size:  # else it has none
        add_mask_token(loaded)
    if has_own and tokenizer is not None:
        require_own(loaded, folder)
    settle_mask(model, loaded)
    check_tokenizer(model, loaded)
    model.drawable = drawable(loaded, model.config.vocab_size)
    if model.config.eos_token_id is None:
        model.config.eos_token_id = loaded.eos_token_id
    return model, loaded


def settle_mask(model: DiT, tokenizer: PreTrainedTokenizerBase) -> None:
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
    mask_token: str | None = None,
    dtype: Literal["auto", "float32", "bf16"] = "auto",
    overwrite: bool = False,
) -> Adapted:
    """Adapts the model in a folder or hub repository and saves it, with its tokenizer, in `out`.

    The mask token is `mask_token`, else the tokenizer's own, else `<|mask|>`; one that the
    tokenizer does not know is added to it, and a row to the model's tables. Raises `InputError`
    before `out` is touched.
    """
    folder = resolve(source)
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
            lm, mask_token_id=mask, block_size=block_size, prediction=prediction, clean=clean
        )
        model.config.bos_token_id, model.config.eos_token_id = bos_id(tokenizer), eos_id(tokenizer)
        folders.clear(target, kinds=("model", "tokenizer"))
        save_model(model, target, tokenizer)
    return model
