"""Published checkpoints: opened, they give what their own code gives, to 1e-4 in float32.

golden/released holds a tiny random checkpoint of each family in its published layout, with tensors
that the published code computed. Others are made here: published names of a model of
`transformers`, which is the reference.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import blockdiff
from blockdiff import cli
from blockdiff.data.tokenizers import read_tokenizer
from blockdiff.errors import InputError
from blockdiff.models import tensors
from helpers import read_golden, tiny_model

FAMILIES = ["sdar_block4", "a2d_qwen3_block4", "fast_dllm_v2_block8", "llada2_moe_block4",
            "setdlms_bd3lm_s4", "setdlms_mdlm", "blockgen_absorb_single4", "wedlm_qwen2_block4",
            "llada_mha", "dream"]  # fmt: skip
BLOCKS = [name for name in FAMILIES if name not in ("setdlms_mdlm", "llada_mha", "dream")]


def write(folder, config, weights, **changes):
    folder.mkdir(exist_ok=True)
    config = {k: v for k, v in (config | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(
            {k: v.contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors"
        )
    return folder


def said(name, io):
    """What a folder of the family does not store."""
    told = {"mask_token_id": int(io["mask_id"])} if "mask_id" in io else {}
    if "block" in io and name not in ("llada_mha", "dream"):
        told["block_size"] = int(io["block"])
    return told


def opener(tmp_path_factory):
    """name → (model, io); each is opened once."""
    models = {}

    def find(name):
        if name not in models:
            config, weights, io = read_golden(f"released/{name}")
            folder = write(tmp_path_factory.mktemp(name) / "model", config, weights)
            models[name] = blockdiff.load_model(folder, **said(name, io)), io
        return models[name]

    return find


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return opener(tmp_path_factory)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def aligned(config, io, name):
    """The published tensor, with what is about token i at i; block starts from the clean pass."""
    theirs = io[name]
    if config.prediction == "same":
        return theirs
    found = torch.cat([theirs[:, :1], theirs[:, :-1]], dim=1)
    if "clean_kv_logits" in io:
        first = torch.arange(config.block_size, found.shape[1], config.block_size)
        found[:, first] = io["clean_kv_logits"][:, first - 1]
    return found


@torch.no_grad()
def decode(model, x_0, x_t):
    """Each noised block after its cached clean prefix, and each clean one, by the decoding path."""
    config, size, rows = model.config, model.config.block_size, np.arange(len(x_0))
    cache = model.new_cache(len(x_0), x_0.shape[1], size)
    cache.admit(rows, np.full(len(rows), size), np.full(len(rows), x_0.shape[1]))
    every = torch.arange(x_0[:, :size].numel())
    streams = {"clean_stream": config.clean_stream, "inside_block": config.inside_block}
    noised, clean = [], []
    for start in range(0, x_0.shape[1], size):
        block = slice(start, start + size)
        at = torch.arange(start, start + size).expand(len(x_0), -1)
        mask = cache.visible(0, size, rows < 0, **streams)
        noised.append(model.decode(x_t[:, block], at, cache, every, mask=mask))
        mask = cache.visible(size, 0, rows >= 0, **streams)
        clean.append(model.decode(x_0[:, block], at, cache, every, mask=mask, clean=size))
        cache.append_staged(rows, 0)
    return [
        torch.stack([part.view(len(x_0), size, -1) for part in parts], 1).flatten(1, 2)
        for parts in (noised, clean)
    ]


@pytest.mark.parametrize("backend", ["blockwise", "dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_logits(name, backend, opened):
    model, io = opened(name)
    x_0 = io["x0"] if name in BLOCKS else None
    with torch.no_grad():
        logits = model(io["xt"], x_0, backend=backend).logits
    seen = torch.ones_like(io["xt"], dtype=torch.bool)
    if model.config.inside_block == "causal":  # no training pass is published, and known tokens
        seen = io["xt"] == model.config.mask_token_id  # have no logits
    key = next(key for key in ("logits_train", "logits", "logits_block") if key in io)
    close(logits[seen], aligned(model.config, io, key)[seen])


@pytest.mark.parametrize("name", BLOCKS)
def test_block_logits_with_the_cache(name, opened):
    model, io = opened(name)
    noised, clean = decode(model, io["x0"], io["xt"])
    seen = torch.ones_like(io["xt"], dtype=torch.bool)
    if model.config.inside_block == "causal":
        seen = io["xt"] == model.config.mask_token_id
    close(noised[seen], io["logits_block"][seen])
    if "clean_kv_logits" in io:
        close(clean, io["clean_kv_logits"])


def test_conventions_are_the_familys(opened):
    found = {}
    for name in FAMILIES:
        config = opened(name)[0].config
        found[name] = (config.kind, config.prediction, config.clean_stream, config.prompt_grid)
    block = ("bd3lm", "same", "block", "absolute")
    assert found == dict.fromkeys(FAMILIES, block) | {
        "a2d_qwen3_block4": ("bd3lm", "same", "block", "prompt_end"),
        "fast_dllm_v2_block8": ("bd3lm", "shift", "block", "absolute"),
        "setdlms_mdlm": ("mdlm", "same", "block", "absolute"),
        "wedlm_qwen2_block4": ("bd3lm", "same", "causal", "prompt_end"),
        "llada_mha": ("mdlm", "same", "block", "absolute"),
        "dream": ("mdlm", "shift", "block", "absolute"),
    }


@pytest.mark.parametrize("name", ["setdlms_bd3lm_s4", "setdlms_mdlm"])
def test_set_diffusion_losses(name, opened):
    model, io = opened(name)
    masked = io["xt"] == model.config.mask_token_id
    x_0 = io["x0"] if name in BLOCKS else None
    with torch.no_grad():
        nll = model(io["xt"], x_0, at=masked, targets=io["x0"][masked]).nll
    weighted = torch.zeros_like(io["t"])
    weighted[masked] = nll / io["t"][masked]
    torch.testing.assert_close(weighted[:, 1:], io["nlls"], rtol=1e-4, atol=1e-4)


def test_block_gen_at_block_size_one(opened):
    model, io = opened("blockgen_absorb_single4")
    x_t = torch.full_like(io["x0"], model.config.mask_token_id)
    with torch.no_grad():
        single = model(x_t, io["x0"], layout=model.config.layout_of(x_t.shape[1], 1))
    close(single.logits, io["logits_train_block1"])


def test_set_diffusion_ar_and_its_kinds(tmp_path):
    """Their AR has the tensors of the paper's, under another configuration."""
    _, weights, io = read_golden("ar")
    config, _, _ = read_golden("released/setdlms_mdlm")
    config["backbone_config"] |= {"causal_attention": True, "vocab_size": 200, "length": 64}
    config |= {"model_type": "ar", "length": 64}
    model = blockdiff.load_model(write(tmp_path / "ar", config, weights))
    assert model.config.kind == "ar" and model.config.mask_token_id == 103
    with torch.no_grad():
        close(model(io["x0"]).logits, io["logits"])
    for changes in ({"architectures": ["SetDLM"]}, {"model_type": "denoiser"}):
        with pytest.raises(InputError, match="not supported"):
            blockdiff.load_model(write(tmp_path / "ar", config, weights, **changes))


def test_block_gen_with_a_causal_clean_stream(tmp_path, opened):
    config, weights, io = read_golden("released/blockgen_absorb_single4")
    folder = write(tmp_path / "multi", config, weights, x0_causal=True, length=40)
    model = blockdiff.load_model(folder, block_size=8)
    assert model.config.clean_stream == "causal" and model.config.block_size == 8
    x_0, x_t = (x.repeat(1, 2) for x in (io["x0"], io["xt"]))
    with torch.no_grad():
        whole = model(x_t, x_0).logits
    close(decode(model, x_0, x_t)[0], whole)


# Models made here: the reference is the class of transformers, under an explicit mask.

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "head_dim": 8}  # fmt: skip


def random_lm(kind, **fields):
    config = CONFIG_MAPPING[kind](**(SMALL | fields))
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
            if "inv_freq" in name or not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
    return lm


def published(lm):
    weights = dict(lm.state_dict())
    if lm.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name in [name for name in weights if name.endswith("experts.gate_up_proj")]:
        stem = name.removesuffix("gate_up_proj")
        both, down = weights.pop(name), weights.pop(f"{stem}down_proj")
        for i in range(len(both)):
            gate, up = both[i].chunk(2)
            weights[f"{stem}{i}.gate_proj.weight"], weights[f"{stem}{i}.up_proj.weight"] = gate, up
            weights[f"{stem}{i}.down_proj.weight"] = down[i]
    return weights


def as_llada(weights):
    rules = [
        (r"^model\.layers\.", "model.transformer.blocks."), (r"self_attn\.(.)_proj", r"\1_proj"),
        (r"\.o_proj", ".attn_out"), (r"input_layernorm", "attn_norm"),
        (r"post_attention_layernorm", "ff_norm"), (r"mlp\.gate_proj", "ff_proj"),
        (r"mlp\.up_proj", "up_proj"), (r"mlp\.down_proj", "ff_out"),
        (r"^model\.embed_tokens", "model.transformer.wte"),
        (r"^model\.norm", "model.transformer.ln_f"), (r"^lm_head", "model.transformer.ff_out"),
    ]  # fmt: skip
    return _rename(weights, rules)


def as_llada2(weights):
    rules = [
        (r"embed_tokens", "word_embeddings"), (r"self_attn\.o_proj", "attention.dense"),
        (r"self_attn\.q_norm", "attention.query_layernorm"),
        (r"self_attn\.k_norm", "attention.key_layernorm"),
        (r"e_score_correction_bias", "expert_bias"), (r"self_attn", "attention"),
    ]  # fmt: skip
    found = _rename(weights, rules)
    for name in [name for name in found if re.search(r"attention\.q_proj", name)]:
        parts = [found.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        found[name.replace("q_proj", "query_key_value")] = torch.cat(parts)
    return found


def _rename(weights, rules):
    found = {}
    for name, tensor in weights.items():
        for pattern, into in rules:
            name = re.sub(pattern, into, name)
        found[name] = tensor
    return found


@torch.no_grad()
def reference(lm, x_t, x_0, block_size):
    """Logits of both streams in one pass over x_t ⊕ x_0 under the paper's mask."""
    length = x_t.shape[1]
    place = torch.arange(2 * length)
    block, clean = place % length // block_size, place >= length
    own = (block[:, None] == block) & (clean[:, None] == clean)
    before = (block[:, None] > block) & clean
    mask = torch.where(own | before, 0.0, -torch.inf)[None, None].expand(len(x_t), 1, -1, -1)
    logits = lm(
        torch.cat([x_t, x_0], 1), attention_mask=mask, position_ids=(place % length)[None],
        use_cache=False,
    ).logits  # fmt: skip
    return logits.split(length, dim=1)


MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LLADA = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48,
         "max_sequence_length": 64, "vocab_size": 57, "embedding_size": 61, "block_type": "llama",
         "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "rms_norm_eps": 1e-6,
         "rope_theta": 5e5, "mask_token_id": 60}  # fmt: skip
VARIANTS = {
    "sdar tied": ("qwen3", {"tie_word_embeddings": True}, {"model_type": "sdar", "block_size": 8}),
    "sdar moe": (
        "qwen3_moe",
        MOE | {"num_experts": 4, "norm_topk_prob": True},
        {"model_type": "sdar_moe", "block_size": 4},
    ),
    "a2d qwen2": ("qwen2", {"tie_word_embeddings": True}, {"model_type": "a2d-qwen2"}),
    "a2d llama": (
        "llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"model_type": "a2d-llama", "rope_parameters": ..., "rope_theta": 5e5,
         "rope_scaling": LLAMA3},
    ),
    "fast untied": ("qwen2", {}, {"model_type": "Fast_dLLM_Qwen", "bd_size": 16}),
    "llada gqa": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        LLADA | {"model_type": "llada", "weight_tying": False},
    ),
    "llada biases": (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
         "tie_word_embeddings": True},
        LLADA | {"model_type": "llada", "include_qkv_bias": True},
    ),
    "dream mqa": ("qwen2", {"num_key_value_heads": 1}, {"model_type": "Dream"}),
    "llada2": (
        "glm4_moe",
        MOE
        | {"n_routed_experts": 8, "n_shared_experts": 2, "n_group": 2, "topk_group": 1,
           "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
           "num_key_value_heads": 4},
        {"model_type": "llada2_moe", "num_experts": 8, "num_shared_experts": 2,
         "use_qkv_bias": True, "rope_theta": 10000.0},
    ),
}  # fmt: skip


def make_variant(folder, name):
    kind, fields, changes = VARIANTS[name]
    lm = random_lm(kind, **fields)
    weights = published(lm)
    if "llada" in name:
        weights = as_llada2(weights) if name == "llada2" else as_llada(weights)
    kept = ("vocab_size", "head_dim", "model_type")
    config = {} if changes["model_type"] == "llada" else lm.config.to_dict() | SMALL
    config |= {key: fields[key] for key in fields if key not in kept and config}
    if config and "rope_theta" not in changes:
        config["rope_theta"] = lm.config.rope_parameters["rope_theta"]
    config.pop("rope_parameters", None)
    return lm, write(folder, config, weights, **changes)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_a_family_is_its_class_under_a_mask(name, tmp_path):
    lm, folder = make_variant(tmp_path / "model", name)
    model = blockdiff.load_model(folder, mask_token_id=60)
    config = model.config
    assert config.mask_token_id == 60
    size = min(config.block_size, 64)
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(60, (2, 64), generator=generator)
    x_t = torch.where(torch.rand(x_0.shape, generator=generator) < 0.5, 60, x_0)
    noised, clean = reference(lm, x_t, x_0, size)
    with torch.no_grad():
        ours = model(x_t, x_0).logits
    io = {"logits": noised} | ({"clean_kv_logits": clean} if size < 64 else {})
    close(ours, aligned(config, io, "logits"))


def test_wedlm_on_qwen3_is_causal_in_its_clean_stream(tmp_path):
    lm = random_lm("qwen3")
    config = lm.config.to_dict() | {"qk_norm": True, "attention_bias": False, "mask_token_id": 60}
    folder = write(tmp_path / "model", config, published(lm), model_type="wedlm")
    model = blockdiff.load_model(folder)
    assert model.config.block_size == 16 and model.config.inside_block == "causal"
    x = torch.randint(60, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(decode(model, x, x)[1], lm(x).logits)


# what a folder does not store


def small_tokenizer(folder, *special, **named):
    words = {f"w{i}": i for i in range(58)} | {token: 58 + i for i, token in enumerate(special)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", **named)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(folder)


def test_the_mask_token_is_found_as_the_family_finds_it(tmp_path):
    _, folder = make_variant(tmp_path / "a2d", "a2d qwen2")
    with pytest.raises(InputError, match="give `mask_token_id`"):
        blockdiff.load_model(folder)
    assert blockdiff.load_model(folder, mask_token_id=7).config.mask_token_id == 7
    small_tokenizer(folder, "<|mask|>", mask_token="<|mask|>")
    model = blockdiff.load_model(folder)
    assert model.config.mask_token_id == 58 and model.config.block_sizes == (32,)
    with pytest.raises(InputError, match="outside the vocabulary"):
        blockdiff.load_model(folder, mask_token_id=61)
    # The default of the family's code, and of its block size.
    lm = random_lm("qwen2", vocab_size=151_700, hidden_size=8, intermediate_size=8, head_dim=2)
    config = lm.config.to_dict() | {"rope_theta": 1e4}
    folder = write(tmp_path / "fast", config, published(lm), model_type="Fast_dLLM_Qwen")
    model = blockdiff.load_model(folder)
    assert (model.config.mask_token_id, model.config.block_size) == (151_665, 32)


def test_a_tokenizer_without_a_mask_token_has_the_models(tmp_path):
    """SDAR's has the token and does not say what it is for; no other one is added."""
    _, folder = make_variant(tmp_path / "sdar", "sdar tied")
    config = json.loads((folder / "config.json").read_text()) | {"mask_token_id": 59}
    (folder / "config.json").write_text(json.dumps(config))
    small_tokenizer(folder, "<other>", "<MASK>")
    model, tokenizer = blockdiff.load(folder)
    assert tokenizer.mask_token == "<MASK>" and tokenizer.mask_token_id == 59
    assert len(tokenizer) == 60 and model.config.mask_token_id == 59
    model, tokenizer = blockdiff.load(folder, mask_token_id=58)
    assert tokenizer.mask_token == "<other>" and model.config.mask_token_id == 58


def test_a_tokenizer_class_of_the_folders_own_that_is_a_copy(tmp_path):
    """Dream's is Qwen2's; its code is not run."""
    words = {c: i for i, c in enumerate("abcdefgh")} | {"ab": 8, "<|endoftext|>": 9}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {
        "tokenizer_class": "DreamTokenizer", "mask_token": "<|mask|>",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {"10": {"content": "<|mask|>", "special": True}},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("abc") == [8, 2] and tokenizer.mask_token_id == 10
    config |= {"tokenizer_class": "OtherTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="custom code"):
        read_tokenizer(tmp_path)


def test_each_writes_text_alone_as_in_a_batch(opened):
    for name in FAMILIES:
        prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
        wish = {"max_new_tokens": 5, "seed": 3, "stop": "none"}
        model, _ = opened(name)
        both = blockdiff.generate(model, prompts, **wish)
        for row, prompt in enumerate(prompts):
            alone = blockdiff.generate(model, [prompt], rows=[row], **wish)
            assert alone.tokens[0] == both.tokens[row], name


def test_a_block_size_that_is_said_and_one_it_was_not_trained_for(tmp_path):
    _, folder = make_variant(tmp_path / "sdar", "sdar tied")
    model = blockdiff.load_model(folder, mask_token_id=60, block_size=4)
    assert model.config.block_size == 4 and model.config.block_sizes == (8,)
    with pytest.warns(UserWarning, match="trained with block size 8, not 4"):
        model.config.choose_block_size()
    _, folder = make_variant(tmp_path / "a2d", "a2d qwen2")
    model = blockdiff.load_model(folder, mask_token_id=60, block_size=4)
    assert model.config.block_sizes == (4,)
    with pytest.raises(InputError, match="block size 65 is more than"):
        blockdiff.load_model(folder, mask_token_id=60, block_size=65)


def test_a_whole_text_is_one_block_as_long_as_it_is(opened):
    """LLaDA and Dream know contexts far longer than a text, which is filled as it stands."""
    for name in ("llada_mha", "dream"):
        model, io = opened(name)
        prompt = io["prompt"][0].tolist()
        done = blockdiff.generate(model, [prompt], max_new_tokens=5, seed=1, stop="none")
        assert [len(row) for row in done.tokens] == [5] and done.nfe == [5]
        both = blockdiff.generate(
            model, [prompt[:3], prompt], max_new_tokens=5, seed=1, stop="none", rows=[3, 0]
        )
        assert both.tokens[1] == done.tokens[0]
        measured = blockdiff.likelihood(model, io["x0"], estimator="exact_k", draws=2)
        assert measured.nats.isfinite().all()


# folders


@pytest.mark.parametrize("name", ["sdar moe", "llada2", "llada gqa", "fast untied"])
def test_saved_it_is_an_ordinary_folder_of_its_class(name, tmp_path):
    lm, folder = make_variant(tmp_path / "model", name)
    model = blockdiff.load_model(folder, mask_token_id=60)
    blockdiff.save_model(model, tmp_path / "saved")
    again = blockdiff.load_model(tmp_path / "saved")
    assert again.config.record() == model.config.record()
    for (own, tensor), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), own
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    x = torch.arange(12)[None]
    with torch.no_grad():
        close(plain(x).logits, lm(x).logits)


def test_dtype_of_the_files_not_the_word_in_their_config(tmp_path):
    config, weights, io = read_golden("released/sdar_block4")
    folder = write(tmp_path / "model", config, weights)  # says bfloat16
    told = said("sdar_block4", io)
    assert blockdiff.load_model(folder, dtype="auto", **told).dtype == torch.float32
    assert blockdiff.load_model(folder, dtype=torch.bfloat16, **told).dtype == torch.bfloat16
    write(folder, config, {k: v.bfloat16() for k, v in weights.items()})
    assert blockdiff.load_model(folder, **told).dtype == torch.float32
    model = blockdiff.load_model(folder, dtype="auto", **told, device_map="cpu")
    assert model.dtype == torch.bfloat16
    with pytest.raises(InputError, match="`dtype`"):
        blockdiff.load_model(folder, dtype="float32")


def test_devices_are_named_as_transformers_names_them(tmp_path):
    _, folder = make_variant(tmp_path / "model", "sdar tied")
    x = torch.arange(8)[None]
    whole = blockdiff.load_model(folder, mask_token_id=60)
    for places in ("cpu", "auto", {"model": "cpu", "lm_head": "cpu"}, {"": torch.device("cpu")}):
        model = blockdiff.load_model(folder, mask_token_id=60, device_map=places)
        with torch.no_grad():
            assert torch.equal(model(x).logits, whole(x).logits)
    for places, match in (("abacus", "cannot be used here"), ({"model": "cpu"}, "no device for lm"),
                          ({"": "disk"}, "on disk")):  # fmt: skip
        _, other = make_variant(tmp_path / "other", "fast untied")
        with pytest.raises(InputError, match=match):
            blockdiff.load_model(other, mask_token_id=60, device_map=places)
    with pytest.raises(InputError, match="only name one device"):
        blockdiff.load_model("starter", device_map="auto")
    assert blockdiff.load("starter", device_map="cpu")[0].device.type == "cpu"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells no peak of memory")
def test_weights_are_never_held_twice(tmp_path):
    """Opening takes what the model takes, and a part of one file."""
    config = blockdiff.DiTConfig(
        25_000, 64, 4, hidden_size=448, num_hidden_layers=2, num_attention_heads=4, adaln=False
    )
    with torch.device("meta"):
        shapes = blockdiff.DiT(config).state_dict()
    weights = {k: torch.full(v.shape, 0.5, dtype=torch.bfloat16) for k, v in shapes.items()}
    folder = write(tmp_path / "model", config.to_dict(), weights)
    code = (
        "import re, sys, blockdiff; peak = lambda: "
        "int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]); "
        "blockdiff.load_model('starter'); blockdiff.models.tensors._MAPPED = 2**24; "
        "before = peak(); "
        "model = blockdiff.load_model(sys.argv[1]); "
        "print((peak() - before) * 1024 / sum(4 * p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert 0.5 < float(done.stdout) < 1.3, done.stderr


def test_a_model_too_large_is_refused_with_the_dtype_that_fits(tmp_path, monkeypatch):
    _, folder = make_variant(tmp_path / "model", "sdar tied")
    numbers = sum(p.numel() for p in blockdiff.load_model(folder, mask_token_id=60).parameters())
    read = []
    monkeypatch.setattr(tensors.Reader, "__call__", lambda *given: read.append(given))
    monkeypatch.setattr(tensors, "free_memory", lambda devices: 3 * numbers)
    with pytest.raises(InputError, match=r"free; .*give `dtype` bf16"):
        blockdiff.load_model(folder, mask_token_id=60)
    monkeypatch.setattr(tensors, "free_memory", lambda devices: numbers)
    with pytest.raises(InputError, match="a smaller model"):
        blockdiff.load_model(folder, mask_token_id=60)
    assert not read


# bad input


def bad(folder, match):
    with pytest.raises(InputError, match=match) as caught:
        blockdiff.load_model(folder)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_opened_is_named(tmp_path):
    _, folder = make_variant(tmp_path / "model", "sdar tied")
    config = json.loads((folder / "config.json").read_text()) | {"mask_token_id": 60}
    for changes, match in (
        ({"model_type": "nobody"}, "'nobody' is neither"),
        ({"model_type": "nemotron_labs_diffusion"}, "known, but not supported"),
        ({"model_type": "diffusion_gemma"}, "known, but not supported"),
        ({"model_type": "lladamoe"}, "known, but not supported"),
        ({"model_type": "qwen2", "auto_map": {"AutoModel": "modeling.M"}}, "code of its own"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_hidden_layers": 3, "layer_types": ...}, "is missing"),
        ({"num_hidden_layers": 1, "layer_types": ...}, "belongs to no layer"),
        ({"num_hidden_layers": 10**9, "layer_types": ...}, "num_hidden_layers"),
        ({"intermediate_size": 40}, "has shape"),
        ({"num_attention_heads": "many"}, "does not describe a model"),
        ({"mask_token_id": 61}, "outside the vocabulary"),
    ):
        bad(write(folder, config, None, **changes), match)
    write(folder, config, None)
    blockdiff.load_model(folder)


@pytest.mark.parametrize(
    "field", [{"include_bias": True}, {"alibi": True}, {"layer_norm_type": "default"},
              {"block_type": "sequential"}]
)  # fmt: skip
def test_llada_of_another_kind_is_refused_by_its_field(field, tmp_path):
    _, folder = make_variant(tmp_path / "model", "llada gqa")
    config = json.loads((folder / "config.json").read_text()) | field
    bad(write(folder, config, None), f"{next(iter(field))} .* is not supported")


def test_a_plain_folder_whose_weights_do_not_fit(tmp_path, capfd):
    """transformers makes up what is missing, and reports it; here it is one line."""
    lm, name = random_lm("qwen2"), "model.layers.1.mlp.up_proj.weight"
    lm.save_pretrained(tmp_path / "model")
    weights, config = dict(lm.state_dict()), lm.config.to_dict()
    capfd.readouterr()
    for change, match in (
        ({name: None}, "is missing"),
        ({name: weights[name][:10]}, r"has shape \[10, 32\]"),
        ({name: weights[name] * torch.nan}, "not finite"),
    ):
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        bad(write(tmp_path / "model", config, changed), match)
    assert capfd.readouterr().err == ""


def test_shards_that_are_missing_and_experts_that_are(tmp_path):
    _, folder = make_variant(tmp_path / "model", "llada2")
    weights = tensors.find_tensors(folder)
    path = folder / "model.safetensors"
    shutil.move(path, folder / "a.safetensors")
    places = dict.fromkeys(weights, "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places | {"other": "b.safetensors"}}))
    with pytest.raises(InputError, match=r"names 'b\.safetensors', which is not in"):
        blockdiff.load_model(folder, mask_token_id=60)
    read = tensors.Reader(tensors.find_tensors(write(tmp_path / "x", {}, {"y": torch.ones(2)})))
    assert read("y").tolist() == [1, 1]
    read.close()
    index.write_text(json.dumps({"weight_map": places}))
    assert blockdiff.load_model(folder, mask_token_id=60).config.mask_token_id == 60
    whole = tensors.Reader(tensors.find_tensors(folder))
    kept = {name: whole(name) for name in weights if ".experts.3.up_proj" not in name}
    index.unlink()
    save_file(kept, path)
    whole.close()
    with pytest.raises(InputError, match="is incomplete"):
        blockdiff.load_model(folder, mask_token_id=60)


# the command line


def run(capsys, *words):
    """What a command prints, and how it ends."""
    code = 0
    try:
        cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_commands_take_what_a_folder_does_not_store(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    _, folder = make_variant(tmp_path / "model", "a2d qwen2")
    small_tokenizer(folder, "<a>", "<b>")
    text = tmp_path / "text.txt"
    text.write_text("w2 w3 w4 w5 w6 w7 w8 w9 " * 20)
    code, _, error = run(capsys, "generate", folder, "w2 w3", "--max-new-tokens", 3)
    assert code == 2 and "give --mask-token-id" in error and error.count("\n") == 1
    told = ("--mask-token-id", 59, "--block-size", 4, "--dtype", "auto")
    words = (*told, "--precision", "float32", "--json")
    code, out, _ = run(capsys, "generate", folder, "w2 w3", "--max-new-tokens", 3, *words)
    assert code == 0 and json.loads(out)["texts"][0]
    code, out, _ = run(capsys, "evaluate", folder, text, "--length", 16, *words)
    assert code == 0 and json.loads(out)["block_size"] == 4
    code, out, _ = run(capsys, "score", folder, "w2 w3", " w4 w5", *told, "--json")
    assert code == 0 and json.loads(out)["tokens"] == 2
    code, _, error = run(capsys, "score", folder, "w2", " w4", "--mask-token-id", -1)
    assert code == 2 and "--mask-token-id is -1" in error


# back into the paper's layout


@pytest.mark.parametrize("name", ["bd3lm_block4", "mdlm", "ar", "sedd_backbone"])
def test_exported_it_is_the_paper_s_own(name, tmp_path, capsys):
    """Key by key and number by number what was published, and the same when opened again."""
    config, weights, _ = read_golden(name)
    config |= {"parameterization": "sedd"} if name == "sedd_backbone" else {}
    if name == "bd3lm_block4":
        weights["backbone.sampling_eps_min"] = torch.tensor(0.25)
        weights["backbone.sampling_eps_max"] = torch.tensor(0.75)
    model = blockdiff.load_model(write(tmp_path / "released", config, weights))
    blockdiff.save_model(model, tmp_path / "ours")
    code, out, _ = run(capsys, "export", tmp_path / "ours", tmp_path / "out", "--layout", "bd3lm")
    assert code == 0 and "bd3lm layout" in out
    exported = tensors.find_tensors(tmp_path / "out")
    read = tensors.Reader(exported)
    assert exported.keys() == weights.keys()
    for name_of, tensor in weights.items():
        assert torch.equal(read(name_of), tensor), name_of
    read.close()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "bd3lm"
    for key in config.keys() - {"attn_backend", "var_min"}:
        assert written[key] == config[key], key
    again = blockdiff.load_model(tmp_path / "out")
    saved = ("dtype", "architectures", "auto_map")  # what `save_model` notes
    ours, theirs = (m.config.to_dict() | dict.fromkeys(saved) for m in (model, again))
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))  # noqa: B905


def test_what_the_layout_cannot_hold_is_refused_before_anything_is_written(tmp_path, capsys):
    _, adapted = make_variant(tmp_path / "sdar", "sdar tied")
    changes = [{"clean_stream": "causal"}, {"keep_first": False}]
    for number, change in enumerate(changes):
        blockdiff.save_model(tiny_model(**change), tmp_path / str(number))
    config = json.loads((adapted / "config.json").read_text()) | {"mask_token_id": 60}
    write(adapted, config, None)
    for source, match in (("0", "clean_stream 'causal'"), ("1", "keep_first False"),
                          ("sdar", "adapted")):  # fmt: skip
        code, _, error = run(capsys, "export", tmp_path / source, tmp_path / "out")
        assert code == 2 and match in error and not (tmp_path / "out").exists()
    code, _, error = run(capsys, "export", "starter", tmp_path / "out")
    assert code == 2 and "cannot hold" in error and not (tmp_path / "out").exists()
    blockdiff.save_model(tiny_model(), tmp_path / "plain")
    code, _, _ = run(capsys, "export", tmp_path / "plain", tmp_path / "out")
    assert code == 0 and blockdiff.load_model(tmp_path / "out").config.block_size == 4
    code, _, error = run(capsys, "export", tmp_path / "plain", tmp_path / "out")
    assert code == 2 and "--overwrite" in error
