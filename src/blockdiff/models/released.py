"""Published checkpoints of block diffusion models: how each is told, and what it becomes here.

A family is told by its config.json (and, where that says nothing, by the names of its tensors).
What it becomes is a `Recipe`: the configuration of our DiT, or of the `transformers` class whose
layers it has, where each stored tensor goes, and the conventions of `models.denoiser`. Code that
comes with a folder is never run.

    family            told by                     its layers     a block's text          L'
    bd3lms            hidden_dim, n_blocks        our DiT        same position           stored
    Set Diffusion     backbone_config             our DiT        same position           stored
    BlockGen          x0_causal, no model_type    our DiT        same position           16
    SDAR, TraDo       sdar, sdar_moe              Qwen3(Moe)     same position           stored
    A2D (dllm)        a2d-qwen3, -qwen2, -llama   the same       same position           32
    Fast-dLLM v2      Fast_dLLM_Qwen              Qwen2          shifted                 stored
    LLaDA2.x          llada2_moe, llada21_moe     Glm4Moe        same position           32
    LLaDA             llada                       Llama, Qwen2   same position           whole text
    Dream             Dream                       Qwen2          shifted                 whole text
    WeDLM             wedlm                       Qwen2, Qwen3   same; causal in blocks  16

What a folder does not store is what the family's own code takes: the id of the mask token there, or
the tokenizer's mask token; the block size above. Either can be said instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING

from blockdiff.errors import InputError
from blockdiff.models import released_dit, released_lm
from blockdiff.models.recipe import Found, Recipe
from blockdiff.models.tensors import Files


@dataclass(frozen=True)
class Family:
    """`told`: whether a config.json and the names beside it are of this family."""

    name: str
    told: Callable[[Mapping[str, Any], Files], bool]
    recipe: Callable[[Found], Recipe]


def _type(*names: str) -> Callable[[Mapping[str, Any], Files], bool]:
    return lambda raw, files: raw.get("model_type") in names


FAMILIES = (
    Family(
        "bd3lms", lambda raw, files: "hidden_dim" in raw and "n_blocks" in raw, released_dit.bd3lms
    ),
    Family(
        "Set Diffusion", lambda raw, files: "backbone_config" in raw, released_dit.set_diffusion
    ),
    Family("SDAR", _type("sdar", "sdar_moe"), released_lm.sdar),
    Family("A2D", _type("a2d-qwen3", "a2d-qwen2", "a2d-llama"), released_lm.a2d),
    Family("Fast-dLLM v2", _type("Fast_dLLM_Qwen"), released_lm.fast_dllm),
    Family("LLaDA2", _type("llada2_moe", "llada21_moe"), released_lm.llada2),
    Family("LLaDA", _type("llada", "fastdllm_llada"), released_lm.llada),
    Family("Dream", _type("Dream", "fastdllm_dream"), released_lm.dream),
    Family("WeDLM", _type("wedlm"), released_lm.wedlm),
    Family(
        "BlockGen",
        lambda raw, files: (
            "model_type" not in raw and "x0_causal" in raw and "vocab_embed.embedding" in files
        ),
        released_dit.block_gen,
    ),
)
# Published types that this package cannot open, and why.
UNSUPPORTED = {
    "nemotron_labs_diffusion": "it has a diffusion head of its own beside its encoder",
    "diffusion_gemma": "it starts from uniform tokens and has no likelihood",
    "lladamoe": "only the dense LLaDA and LLaDA2 are supported",
    "llada_moe": "only the dense LLaDA and LLaDA2 are supported",
    "Fast_dLLM_Qwen3": "only Fast-dLLM v2 on Qwen2 is supported",
    "Fast_dLLM_Qwen3_5": "only Fast-dLLM v2 on Qwen2 is supported",
    "rnd1": "it has no blocks",
    "denoiser": "of the Set Diffusion group BD3-LM, MDLM and AR are supported",
}
# Fields by which a plain type's folder says that code of its own makes it a diffusion model (SDLM).
_DIFFUSION_FIELDS = ("block_size", "bd_size", "mask_token_id", "text_mask_token_id", "causal_attn")


def find_recipe(found: Found) -> Recipe | None:
    """What a folder becomes; None where it is none of these families.

    Raises `InputError` for a known type that is not supported, and for a folder of a plain type
    that is a diffusion model by code of its own.
    """
    raw = found.raw
    kind = raw.get("model_type")
    if kind in UNSUPPORTED:
        raise InputError(f"{kind} is known, but not supported: {UNSUPPORTED[kind]}")
    for family in FAMILIES:
        if family.told(raw, found.files):
            if raw.get("quantization_config"):
                raise InputError(f"quantised weights of {family.name} are not supported")
            return family.recipe(found)
    own_code = isinstance(raw.get("auto_map"), dict) and "block_diffusion" not in raw
    fields = [name for name in _DIFFUSION_FIELDS if raw.get(name) is not None]
    if own_code and fields and kind in CONFIG_MAPPING:
        raise InputError(
            f"it is {kind} made a diffusion model by code of its own ({fields[0]} in config.json), "
            "as SDLM is, which is not supported: without that code it would be another model"
        )
    return None
