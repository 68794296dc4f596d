"""Published checkpoints whose network is our DiT: bd3lms, the Set Diffusion group, BlockGen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blockdiff.errors import InputError
from blockdiff.models.config import DiTConfig
from blockdiff.models.recipe import CLIP, Found, Recipe, first, renamed
from blockdiff.models.tensors import Reader

# The released name → ours; the rest of each name is kept.
DIT_NAMES: tuple[tuple[str, str], ...] = (
    (r"^backbone\.", ""),
    (r"^vocab_embed\.embedding$", "embedding.weight"),
    (r"^sigma_map\.mlp\.0\.", "sigma.inner."),
    (r"^sigma_map\.mlp\.2\.", "sigma.outer."),
    (r"^blocks\.", "layers."),
    (r"\.norm1\.", ".norm_1."),
    (r"\.norm2\.", ".norm_2."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.attn_out\.", ".attention_out."),
    (r"\.mlp\.0\.", ".mlp_in."),
    (r"\.mlp\.2\.", ".mlp_out."),
    (r"\.adaLN_modulation\.", ".modulation."),
    (r"^output_layer\.norm_final\.", "output.norm."),
    (r"^output_layer\.", "output."),
)
_dit = renamed(DIT_NAMES)


def bd3lms(found: Found) -> Recipe:
    read = Reader(found.files)
    clips = {name: read(name) for name in found.files if name.endswith(CLIP)}
    read.close()
    names_mask = any(found.raw.get(name) is not None for name in ("mask_token_id", "mask_index"))
    return Recipe(released_config(found.raw, clips), _dit, names_mask=names_mask)


def released_config(raw: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DiTConfig:
    """Our configuration for one of bd3lms; the clip is read from its buffers.

    Raises `InputError` where it does not tell what the model is: a network that is fed the time
    may be SEDD or MDLM, with the same weights' names.
    """
    clip = [
        float(weights[name].flatten()[0])
        for key in CLIP
        for name in (key, f"backbone.{key}")
        if name in weights
    ]
    two_stream = raw.get("cross_attn", True) and "block_size" in raw
    timed = raw.get("time_conditioning", False)
    if timed and two_stream and raw["block_size"] != raw["model_length"]:
        raise InputError(
            "a time-conditioned model of several blocks feeds its clean stream the noise level of "
            "the noised one, which this package does not: it would be another model"
        )
    if timed and "parameterization" not in raw:
        raise InputError(
            "it is fed the time, as SEDD is and MDLM may be; say which by adding "
            '"parameterization": "sedd" or "parameterization": "subs" to it'
        )
    return DiTConfig(
        vocab_size=raw["vocab_size"],
        length=raw["model_length"],
        block_size=raw["block_size"] if two_stream else raw["model_length"],
        hidden_size=raw["hidden_dim"],
        num_hidden_layers=raw["n_blocks"],
        num_attention_heads=raw["n_heads"],
        cond_size=raw.get("cond_dim", 128),
        dropout=raw.get("dropout", 0.1),
        causal=raw.get("causal", False),
        adaln=raw.get("adaln", True),
        time_conditioning=timed,
        score=timed and raw["parameterization"] == "sedd",
        mask_token_id=raw.get("mask_token_id", raw.get("mask_index")),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw.get("eos_token_id"),
        clip=(clip[0], clip[1]) if len(clip) == 2 else None,
    )


def released_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their released names → under ours, without the buffers."""
    return {target: tensor for name, tensor in weights.items() for target, _ in _dit(name)}


def set_diffusion(found: Found) -> Recipe:
    raw, net, words = found.raw, found.raw["backbone_config"], found.raw["tokenization_config"]
    kind, network = raw.get("model_type"), str(net.get("_target_", "DIT")).rpartition(".")[2]
    # Their set and order-agnostic models have the same type, and name another class.
    classes = [*(raw.get("architectures") or []), network]
    other = [name for name in classes if name.lower() not in ("dit", "bd3lm", "mdlm", "ar")]
    if other or kind not in ("bd3lm", "mdlm", "ar") or net.get("is_esolm_backbone"):
        what = other[0] if other else kind
        raise InputError(f"{what} of the Set Diffusion group is known, but not supported")
    if net.get("adaln"):
        raise InputError("a backbone with adaLN of the Set Diffusion group is not supported")
    length = first(raw.get("length"), net.get("length"))
    block = first(raw.get("eval_block_size"), raw.get("block_size"), net.get("block_size"))
    config = DiTConfig(
        vocab_size=first(net.get("vocab_size"), words.get("vocab_size")),
        length=length,
        block_size=block if kind == "bd3lm" else length,
        hidden_size=net["hidden_size"],
        num_hidden_layers=net["num_layers"],
        num_attention_heads=net["n_heads"],
        dropout=net.get("dropout", 0.1),
        causal=bool(net.get("causal_attention", kind == "ar")),
        adaln=False,
        keep_first=raw.get("keep_clean_bos") is not False,
        mask_token_id=words.get("mask_token_id") if kind == "ar" else words["mask_token_id"],
        bos_token_id=words.get("bos_token_id"),
        eos_token_id=words.get("eos_token_id"),
    )
    return Recipe(config, _dit)


def block_gen(found: Found) -> Recipe:
    """The `model` section of its configuration: the vocabulary and adaLN are in the tensors."""
    raw, files = found.raw, found.files
    config = DiTConfig(
        vocab_size=files["vocab_embed.embedding"].shape[0],
        length=raw["length"],
        block_size=found.block(None, 16),
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["n_blocks"],
        num_attention_heads=raw["n_heads"],
        cond_size=raw["cond_dim"],
        dropout=raw.get("dropout", 0.1),
        adaln="sigma_map.mlp.0.weight" in files,
        clean_stream="causal" if raw["x0_causal"] else "block",
    )
    return Recipe(config, _dit)
