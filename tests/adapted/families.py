"""Tiny causal language models of transformers with random weights, one of each family."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from blockdiff.models.adapted import Adapted
from blockdiff.models.adapting import adapt
from blockdiff.models.dit import DiT
from blockdiff.models.layers import rope
from helpers import tiny_model

VOCAB, MASK, CONTEXT, SLIDING = 17, 16, 48, 5
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": CONTEXT, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_PLAIN = {"head_dim", "num_key_value_heads", "intermediate_size"}
_BOTH = {"sliding_window": SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
# Family → (model_type, what its configuration has beside the sizes, sizes it does not know).
_FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("llama", {}, set()),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        set(),
    ),
    "qwen2": ("qwen2", {"use_sliding_window": True, **_BOTH}, {"head_dim"}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, set()),
    "mistral": ("mistral", {"sliding_window": SLIDING}, set()),
    "gemma2": (
        "gemma2",
        {
            **_BOTH, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        set(),
    ),
    "gemma3": ("gemma3_text", {**_BOTH, "query_pre_attn_scalar": 11}, set()),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, _PLAIN),
    "gpt_neox": ("gpt_neox", {}, {"head_dim", "num_key_value_heads"}),
    "phi3": ("phi3", {"sliding_window": SLIDING}, {"head_dim"}),
    "olmo2": ("olmo2", {}, {"head_dim"}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}, {"head_dim"}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7,
            "attention_multiplier": 0.5,
        },
        {"head_dim"},
    ),
    "cohere2": ("cohere2", {**_BOTH, "logit_scale": 0.3}, set()),
    "mixtral": ("mixtral", _EXPERTS, set()),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16},
        set(),
    ),
    "gpt_oss": ("gpt_oss", {**_BOTH, **_EXPERTS}, set()),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
            "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
            "v_head_dim": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
        {"head_dim"},
    ),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}, _PLAIN),
    "phi": ("phi", {}, {"head_dim"}),
    "starcoder2": ("starcoder2", {"sliding_window": SLIDING}, {"head_dim"}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}, {"head_dim"}),
    "glm4": ("glm4", {}, set()),
    "olmo3": ("olmo3", dict(_BOTH), {"head_dim"}),
}  # fmt: skip
FAMILIES = list(_FAMILIES)
_NO_HEADS = {"head_dim", "num_key_value_heads", "num_attention_heads", "max_position_embeddings"}
_RENAMED = _NO_HEADS | {"hidden_size", "num_hidden_layers", "intermediate_size"}
# What cannot be adapted → model_type, settings, sizes it does not know, and a part of the reason.
UNSUITABLE: dict[str, tuple[str, dict[str, Any], set[str], str]] = {
    "falcon": ("falcon", {"alibi": True}, _PLAIN, "does not reach it"),
    "bloom": (
        "bloom",
        {"n_layer": 2, "n_head": 4},
        _RENAMED - {"hidden_size"},
        "does not reach it",
    ),
    "mpt": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
        _RENAMED,
        "does not reach it",
    ),
    "mamba": ("mamba", {"state_size": 4}, _NO_HEADS | _PLAIN, "called 0 times in its 2 layers"),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
        {"head_dim"},
        "called 1 times in its 2 layers",
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"], "num_experts": 2,
            "num_experts_per_tok": 1, "moe_intermediate_size": 8, "linear_num_value_heads": 2,
            "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        set(),
        "called 1 times in its 2 layers",
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"attention_window_size": 8, "lru_width": 32, "num_hidden_layers": 3},
        set(),
        "called 1 times in its 3 layers",
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"]},
        {"head_dim"},
        "called 1 times in its 2 layers",
    ),
    "diffllama": ("diffllama", {}, set(), "called 4 times in its 2 layers"),
    "rwkv": (
        "rwkv",
        {"attention_hidden_size": 32, "context_length": CONTEXT},
        _NO_HEADS,
        "does not reach it",
    ),
    "xlnet": (
        "xlnet",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        _RENAMED,
        "does not reach it",
    ),
    "gptj": ("gptj", {"rotary_dim": 4}, _PLAIN, "does not reach it"),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
        set(),
        "layer 0 is of the kind 'hybrid'",
    ),
    # It masks its window itself and does not tell attention: seen however long the window is.
    "phimoe": (
        "phimoe",
        {"sliding_window": 40, "num_local_experts": 2},
        {"head_dim"},
        "layer 0 has a sliding window of 40 tokens, and its attention is told None",
    ),
}  # fmt: skip
# A few that differ in what matters to a cache: grouped heads, a window in every layer or in some
# with a soft cap, learned positions and a tied head, keys and values of unequal widths, sinks.
FEW = ["llama", "mistral", "gemma2", "gpt2", "deepseek_v3", "gpt_oss"]


def tiny(model_type: str, drop: set[str] = frozenset(), seed: int = 0, **own: Any) -> Any:
    """A causal language model in which every weight is drawn: none is idle."""
    sizes = {name: value for name, value in _SIZES.items() if name not in drop} | own
    config = AutoConfig.for_model(model_type, **sizes)
    lm = AutoModelForCausalLM.from_config(config).eval()
    randomise(lm, seed)
    return lm


def tiny_with_eyes(**own: Any) -> Any:
    """Gemma 3 as it comes from the hub: the part that sees images is of no use to a text."""
    text = {**_SIZES, **_BOTH, "model_type": "gemma3_text", "query_pre_attn_scalar": 11} | own
    eyes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 2, "patch_size": 14, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=eyes, mm_tokens_per_image=4
    )
    lm = AutoModelForCausalLM.from_config(config).eval()
    randomise(lm)
    return lm


def randomise(lm: PreTrainedModel, seed: int = 0) -> None:
    """Maps at a scale at which attention is far from uniform; biases and norms moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lm.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() < 2:
                tensor.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * 1.5 / tensor.shape[-1] ** 0.5)


@lru_cache
def _state(family: str) -> PreTrainedModel:
    model_type, own, drop = _FAMILIES[family]
    return tiny(model_type, drop, **own)


def lm_of(family: str) -> Any:
    """A new copy of the family's model, the same each time."""
    made = _state(family)
    copy = type(made)(made.config.__class__.from_dict(made.config.to_dict())).eval()
    copy.load_state_dict(made.state_dict())
    return copy


def adapted(family: str, **conventions: Any) -> Adapted:
    return adapt(lm_of(family), mask_token_id=MASK, **{"block_size": 4} | conventions)


class Slow:
    """A block after its clean prefix, by transformers' own attention with a whole mask.

    One row of prefix and block, nothing cached: what all that is faster has to equal.
    """

    def __init__(self, lm: Any, clean: str, prediction: str) -> None:
        self.lm, self.clean, self.shift = lm, clean, prediction == "shift"
        lm.set_attn_implementation("eager")

    @torch.no_grad()
    def logits(self, prefix: list[int], block: list[int]) -> torch.Tensor:
        """[K, V] of the block's tokens; under "shift" of the first of a text nothing that counts"""
        return self.of_states(prefix, [block])[0]

    def of_states(self, prefix: list[int], states: list[list[int]]) -> torch.Tensor:
        """[n, K, V] for n states of a block."""
        size, before = len(states[0]), len(prefix)
        place = torch.arange(before + size)
        query, key = place[:, None], place[None, :]
        same = query // size == key // size
        seen = (key <= query) | (same & ((query >= before) | (self.clean == "block")))
        masks = {kind: self._added(seen & near) for kind, near in self._near(query, key).items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        if isinstance(mask, torch.Tensor):
            mask = mask.expand(len(states), 1, -1, -1)
        x = torch.tensor([prefix + state for state in states])
        out = self.lm(input_ids=x, attention_mask=mask, use_cache=False).logits
        first = max(before - 1, 0)
        return out[:, [first, *range(before, before + size - 1)]] if self.shift else out[:, before:]

    def _near(self, query: torch.Tensor, key: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of each kind of layer, which keys its window holds."""
        config = self.lm.config
        near = query - key < (getattr(config, "sliding_window", None) or 10**9)
        if len(set(getattr(config, "layer_types", None) or [])) > 1:
            return {"sliding_attention": near, "full_attention": near | True}
        return {"": near}

    @staticmethod
    def _added(seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo().min)


class SlowDiT(Slow):
    """The same of a `DiT` with a causal clean stream and prediction "shift"."""

    def __init__(self, model: DiT) -> None:
        self.model, self.shift = model, True

    @torch.no_grad()
    def of_states(self, prefix: list[int], states: list[list[int]]) -> torch.Tensor:
        size, before = len(states[0]), len(prefix)
        place = torch.arange(before + size)
        query, key = place[:, None], place[None, :]
        seen = (key <= query) | ((query // size == key // size) & (query >= before))

        def attention(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
            return scores.softmax(-1) @ v

        model = self.model
        cos, sin = rope(place, model.config.hidden_size // model.config.num_attention_heads)
        x = torch.tensor([prefix + state for state in states])
        h = model._run(x, cos, sin, model.condition(), attention)
        out = model.output(h, model.condition().final)
        first = max(before - 1, 0)
        return out[:, [first, *range(before, before + size - 1)]]


def shifted_dit(**settings: Any) -> DiT:
    """A `DiT` that predicts as AR does, of the sizes of the families here."""
    sizes = {"vocab_size": VOCAB, "length": CONTEXT, "block_size": 4, "eos_token_id": 1}
    return tiny_model(clean_stream="causal", prediction="shift", **sizes | settings)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids without the mask token."""
    return torch.randint(MASK, shape, generator=torch.Generator().manual_seed(seed))


WORDS = [f"w{i}" for i in range(12)]


def words_tokenizer(*more: str, **special: str) -> PreTrainedTokenizerFast:
    """<s>, </s>, <unk>, twelve words and `more`, ids in this order; `special`: roles of `more`."""
    names = ["<s>", "</s>", "<unk>", *WORDS, *more]
    model = WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )


def folder_of(lm: Any, folder: Path, tokenizer: Any = None, **options: Any) -> Path:
    """The folder people have: a causal language model, saved by transformers."""
    lm.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
