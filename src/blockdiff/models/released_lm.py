"""Published checkpoints whose layers are those of a causal model in `transformers`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from blockdiff.errors import InputError
from blockdiff.models.recipe import Found, Place, Recipe, first, renamed, require
from blockdiff.models.tensors import Piece

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# Names of a base class's fields that its configurations of before transformers 5 have.
_OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim")


def _base(kind: str, found: Found, **fields: Any) -> PreTrainedConfig:
    """The configuration of a class of transformers: those of the folder's fields it has."""
    layers = fields.get("num_hidden_layers", found.raw.get("num_hidden_layers"))
    if isinstance(layers, int) and layers > len(found.files):  # before a list of them is made
        raise InputError(f"num_hidden_layers is {layers} but there are {len(found.files)} weights")
    known = CONFIG_MAPPING[kind]
    names = known().to_dict().keys() - {"architectures", "dtype", "model_type"}
    own = {name: found.raw[name] for name in {*names, *_OLDER} & found.raw.keys()}
    # Families leave it out at a default of their own.
    own.setdefault("tie_word_embeddings", "lm_head.weight" not in found.files)
    own["vocab_size"] = found.vocab_size
    config: PreTrainedConfig = known(**{**own, **fields})
    return config


def placed(config: PreTrainedConfig, rules: Iterable[tuple[str, str]] = ()) -> Place:
    """Tensors of a causal model under its class's names, experts one beside the other."""
    rename = renamed(rules)
    width = getattr(config, "moe_intermediate_size", 0)

    def place(name: str) -> list[tuple[str, Piece]]:
        found = []
        for target, piece in rename(name):
            expert = _EXPERT.fullmatch(target)
            if expert is None:
                found.append((target, piece))
                continue
            number, down = int(expert[2]), expert[3] == "down"
            half = slice(0, width) if expert[3] == "gate" else slice(width, 2 * width)
            into = (number,) if down else (number, half)
            stacked = f"{expert[1]}.{'down_proj' if down else 'gate_up_proj'}"
            found.append((stacked, piece._replace(into=into)))
        return found

    return place


def sdar(found: Found) -> Recipe:
    experts = "num_experts" in found.raw and found.raw["model_type"] == "sdar_moe"
    config = _base("qwen3_moe" if experts else "qwen3", found)
    conventions = {
        "block_size": found.block("block_size", 4), "mask_token_id": found.mask(151669),
        "prediction": "same", "clean_stream": "block",
    }  # fmt: skip
    return Recipe(config, placed(config), conventions)


def a2d(found: Found) -> Recipe:
    config = _base(found.raw["model_type"].removeprefix("a2d-"), found)
    conventions = {
        "block_size": found.block(None, 32), "mask_token_id": found.mask(),
        "prediction": "same", "clean_stream": "block", "prompt_grid": "prompt_end",
        "remainder": "rounded",
    }  # fmt: skip
    return Recipe(config, placed(config), conventions)


def fast_dllm(found: Found) -> Recipe:
    config = _base("qwen2", found)
    conventions = {
        "block_size": found.block("bd_size", 32), "mask_token_id": found.mask(151665),
        "prediction": "shift", "clean_stream": "block",
    }  # fmt: skip
    return Recipe(config, placed(config), conventions)


_LLADA2_NAMES = (
    (r"\.word_embeddings\.", ".embed_tokens."),
    (r"\.attention\.dense\.", ".self_attn.o_proj."),
    (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
    (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    (r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
)
_FUSED = re.compile(r"(.*)\.attention\.query_key_value\.(weight|bias)")


def llada2(found: Found) -> Recipe:
    raw = found.raw
    require(raw, use_bias=(False,), score_function=("sigmoid",), norm_topk_prob=(True,))
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    width = first(raw.get("head_dim"), raw["hidden_size"] // heads)
    config = _base(
        "glm4_moe",
        found,
        head_dim=width,
        num_key_value_heads=groups,
        attention_bias=raw.get("use_qkv_bias", False),
        use_qk_norm=raw.get("use_qk_norm", True),
        partial_rotary_factor=raw.get("partial_rotary_factor", 0.5),
        n_routed_experts=raw["num_experts"],
        n_shared_experts=raw.get("num_shared_experts") or 0,
        num_nextn_predict_layers=0,
    )
    named = placed(config, _LLADA2_NAMES)
    ends = [0, heads * width, (heads + groups) * width, (heads + 2 * groups) * width]

    def place(name: str) -> list[tuple[str, Piece]]:
        fused = _FUSED.fullmatch(name)
        if fused is None:
            return named(name)
        return [
            (f"{fused[1]}.self_attn.{part}_proj.{fused[2]}", Piece(name, slice(begin, end)))
            for part, begin, end in zip("qkv", ends, ends[1:], strict=False)
        ]

    conventions = {
        "block_size": found.block("block_size", 32), "mask_token_id": found.mask(156895),
        "prediction": "same", "clean_stream": "block",
    }  # fmt: skip
    return Recipe(config, place, conventions)


_LLADA_NAMES = (
    (r"^(model\.)?transformer\.", "model."),
    (r"^model\.wte\.", "model.embed_tokens."),
    (r"^model\.ln_f\.", "model.norm."),
    (r"^model\.ff_out\.", "lm_head."),
    (r"^model\.blocks\.", "model.layers."),
    (r"\.(q|k|v)_proj\.", r".self_attn.\1_proj."),
    (r"\.attn_out\.", ".self_attn.o_proj."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ff_norm\.", ".post_attention_layernorm."),
    (r"\.ff_proj\.", ".mlp.gate_proj."),
    (r"\.up_proj\.", ".mlp.up_proj."),
    (r"\.ff_out\.", ".mlp.down_proj."),
)


def llada(found: Found) -> Recipe:
    raw = found.raw
    require(
        raw, block_type=("llama",), block_group_size=(1,), activation_type=("silu",), rope=(True,),
        alibi=(False,), layer_norm_type=("rms",), layer_norm_with_affine=(True,),
        attention_layer_norm=(False,), input_emb_norm=(False,), scale_logits=(False,),
        include_bias=(False,), bias_for_layer_norm=(None, False),
    )  # fmt: skip
    length, width, heads = raw["max_sequence_length"], raw["d_model"], raw["n_heads"]
    groups = 1 if raw.get("multi_query_attention") else heads
    config = _base(
        "qwen2" if raw.get("include_qkv_bias") else "llama",
        found,
        hidden_size=width,
        intermediate_size=first(raw.get("mlp_hidden_size"), raw.get("mlp_ratio", 4) * width),
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads") or groups,
        max_position_embeddings=length,
        hidden_act="silu",
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_theta=raw.get("rope_theta", 10000.0),
        tie_word_embeddings=bool(raw.get("weight_tying", True)),
    )
    conventions = {
        "block_size": length, "mask_token_id": found.mask(126336),
        "prediction": "same", "clean_stream": "block",
    }  # fmt: skip
    return Recipe(config, placed(config, _LLADA_NAMES), conventions)


def dream(found: Found) -> Recipe:
    config = _base("qwen2", found, use_sliding_window=False)
    conventions = {
        "block_size": found.raw["max_position_embeddings"], "mask_token_id": found.mask(151666),
        "prediction": "shift", "clean_stream": "block", "remainder": "last",
    }  # fmt: skip
    return Recipe(config, placed(config), conventions)


def wedlm(found: Found) -> Recipe:
    raw = found.raw
    biased, normed = raw.get("attention_bias", True), raw.get("qk_norm", False)
    if biased and normed:
        raise InputError("WeDLM with both biases and norms of queries and keys is not supported")
    config = _base("qwen3" if normed else "qwen2" if biased else "llama", found)
    conventions = {
        "block_size": found.block("block_size", 16), "mask_token_id": found.mask(),
        "prediction": "same", "clean_stream": "causal", "inside_block": "causal",
        "prompt_grid": "prompt_end",
    }  # fmt: skip
    return Recipe(config, placed(config), conventions)
