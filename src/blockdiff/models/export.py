"""Our DiT in the layout its paper's checkpoints are published in, which bd3lms reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockdiff import folders
from blockdiff.data.tokenizers import read_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.hub import load_model, resolve
from blockdiff.models.recipe import CLIP
from blockdiff.models.released_dit import released_config
from blockdiff.models.tensors import WEIGHTS
from blockdiff.outputs import staging

# Our name → the released one, in this order; the rest of each name is kept.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"^embedding\.weight$", "vocab_embed.embedding"),
    (r"^sigma\.inner\.", "sigma_map.mlp.0."),
    (r"^sigma\.outer\.", "sigma_map.mlp.2."),
    (r"^layers\.", "blocks."),
    (r"\.norm_1\.", ".norm1."),
    (r"\.norm_2\.", ".norm2."),
    (r"\.qkv\.", ".attn_qkv."),
    (r"\.attention_out\.", ".attn_out."),
    (r"\.mlp_in\.", ".mlp.0."),
    (r"\.mlp_out\.", ".mlp.2."),
    (r"\.modulation\.", ".adaLN_modulation."),
    (r"^output\.norm\.", "output_layer.norm_final."),
    (r"^output\.", "output_layer."),
    (r"^", "backbone."),
)
# What a configuration has that a published one need not tell again: how training began, and what
# `save_pretrained` writes beside it.
_NOT_KEPT = {
    "initial_shift", "initial_gate", "architectures", "auto_map", "dtype", "_name_or_path",
    "transformers_version", "objective",
}  # fmt: skip


def export_folder(
    source: str | Path, out: str | Path, *, layout: str = "bd3lm", overwrite: bool = False
) -> None:
    """Writes the DiT in a folder or hub repository into `out`, in a published layout.

    Weights keep the number format they are stored in; a tokenizer goes along. Raises `InputError`,
    before `out` is touched, for a model with something that the layout cannot say.
    """
    if layout != "bd3lm":
        raise InputError(f"`layout` cannot be {layout!r}; choose bd3lm")
    folder = resolve(source)
    with folders.claim(out, overwrite=overwrite, kinds=("model", "tokenizer")) as target:
        model = load_model(folder, dtype="auto")
        config, weights = released_layout(model)
        words = None
        if (folder / "tokenizer_config.json").is_file():
            words = read_tokenizer(folder)
        folders.clear(target, kinds=("model", "tokenizer"))
        with staging(target) as temporary:
            text = json.dumps(config, indent=2, sort_keys=True)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            if words is not None:
                words.save_pretrained(temporary)


def released_layout(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a DiT, as bd3lms publishes them.

    Raises `InputError` for a model with something that the layout cannot say.
    """
    if not isinstance(model, DiT):
        raise InputError("only the package's own networks can be exported; this one is adapted")
    config = model.config
    clip = {} if config.clip is None else dict(zip(CLIP, config.clip, strict=True))
    buffers = {f"backbone.{name}": torch.tensor(value) for name, value in clip.items()}
    raw = _released_json(config)
    try:
        again = released_config(raw, buffers)
    except InputError as error:
        raise InputError(f"the bd3lm layout cannot hold this model: {error}") from None
    ours, theirs = (x.to_dict() | {"block_sizes": x.block_sizes} for x in (config, again))
    lost = sorted(
        name
        for name in (ours.keys() | theirs.keys()) - _NOT_KEPT
        if ours.get(name) != theirs.get(name)
    )
    if config.objective != config.kind:
        lost.append("objective")
    if lost:
        value = getattr(config, lost[0], None)
        raise InputError(f"the bd3lm layout cannot hold {lost[0]} {value!r} of this model")
    width = config.hidden_size // config.num_attention_heads
    table = 1.0 / (10000 ** (torch.arange(0, width, 2).float() / width))
    weights = {_released_name(name): tensor for name, tensor in model.state_dict().items()}
    weights["backbone.rotary_emb.inv_freq"] = table
    return raw, {name: x.contiguous() for name, x in (weights | buffers).items()}


def _released_json(config: DiTConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model_type": "bd3lm",
        "vocab_size": config.vocab_size,
        "model_length": config.length,
        "block_size": config.block_size,
        "cross_attn": config.kind == "bd3lm",
        "hidden_dim": config.hidden_size,
        "cond_dim": config.cond_size,
        "n_blocks": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "dropout": config.dropout,
        "causal": config.causal,
        "adaln": config.adaln,
        "time_conditioning": config.time_conditioning,
        "attn_backend": "sdpa",
        "var_min": config.clip is not None,
        "mask_token_id": config.mask_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if config.time_conditioning:
        raw["parameterization"] = "sedd" if config.score else "subs"
    return raw


def _released_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
