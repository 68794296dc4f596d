"""LoRA on an adapted model: the same at the start, merged as unmerged, resumed as uninterrupted."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import blockdiff
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.models.lora import add_lora, open_adapter

pytest.importorskip("peft")
TEXT = "The law of the land is the law, and the people keep the law of the land. "


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapted folder with a tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = train_tokenizer([TEXT * 20], 270)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    model = blockdiff.adapt(lm, mask_token_id=tokenizer.mask_token_id, block_size=8)
    blockdiff.save_model(model, folder / "base", tokenizer)
    (folder / "text.txt").write_text(TEXT * 300)
    return folder / "base"


def logits(model: blockdiff.Adapted, x_0: Tensor) -> Tensor:
    """Of words that can be predicted: the mask token's row is trained, and has no logit."""
    mask = model.config.mask_token_id
    x_t = torch.where(torch.arange(x_0.shape[1]) % 2 == 1, mask, x_0)
    with torch.no_grad():
        found = model(x_t, x_0=x_0).logits
    return torch.cat([found[..., :mask], found[..., mask + 1 :]], -1)


def stepped(base: Path, targets: str = "all-linear") -> tuple[blockdiff.Adapted, Tensor, Tensor]:
    """A model with pairs after three steps, x_0, and the logits before them."""
    model = blockdiff.load_model(base)
    x_0 = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(1))
    before = logits(model, x_0)
    add_lora(model, 4, targets, str(base))
    assert torch.equal(logits(model, x_0), before)  # equal at the start
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    torch.manual_seed(0)
    for _ in range(3):
        model(x_0, labels=x_0).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (logits(model, x_0) - before).abs().max() > 0.01
    return model, x_0, before


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj"])
def test_merged_is_unmerged(base: Path, tmp_path: Path, targets: str) -> None:
    model, x_0, _ = stepped(base, targets)
    unmerged = logits(model, x_0)
    blockdiff.save_model(model, tmp_path / "merged")
    merged = blockdiff.load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, x_0), unmerged, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, x_0), unmerged, atol=1e-5, rtol=1e-5)
    # An ordinary folder of the base model's class, the mask token's row trained.
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == "llama"
    rows = [load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (base, tmp_path / "merged")]  # fmt: skip  # noqa: E501
    changed = (rows[0] != rows[1]).any(-1).nonzero().flatten().tolist()
    assert changed == [model.config.mask_token_id]


def test_an_adapter_opens_on_its_base(base: Path, tmp_path: Path) -> None:
    model, x_0, before = stepped(base)
    model.adapter.save(model, tmp_path / "adapter")
    assert torch.equal(logits(blockdiff.load_model(tmp_path / "adapter"), x_0), logits(model, x_0))
    # The base model in its folder is as it was.
    assert torch.equal(logits(blockdiff.load_model(base), x_0), before)
    config = tmp_path / "adapter" / "adapter_config.json"
    for wrong, message in ((str(tmp_path / "gone"), "is missing"), (None, "does not say")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {
            "base_model_name_or_path": wrong}))  # fmt: skip
        with pytest.raises(blockdiff.InputError, match=message):
            blockdiff.load_model(tmp_path / "adapter")
    with pytest.raises(blockdiff.InputError, match="no adapted model"):
        open_adapter(blockdiff.load_model("starter"), tmp_path / "adapter")


def test_only_the_pairs_and_the_mask_row_are_trained(base: Path) -> None:
    model, _, _ = stepped(base)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.endswith("mask_row") for name in names)
    assert sum(name.endswith("mask_row") for name in names) == 1


def test_a_run_is_the_same_resumed(base: Path, tmp_path: Path) -> None:
    config = blockdiff.TrainConfig(
        data=str(base.parent / "text.txt"), out=str(tmp_path / "whole"), init_from=str(base),
        lora=4, length=16, steps=4, batch_size=2, lr=1e-2, ema=0.5, save_every=2,
        eval_windows=2, report_to="none", precision="float32",
    )  # fmt: skip
    whole = blockdiff.train(config, progress=False)
    half = replace(config, out=str(tmp_path / "half"), steps=2)
    blockdiff.train(half, progress=False)
    again = replace(half, steps=4, resume=True)
    blockdiff.train(again, progress=False, given={"steps", "out", "resume"})
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "half"))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=1e-5)
    kept = load_file(tmp_path / "whole" / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert all("lora_" in name or name.endswith("mask_row") for name in kept)
    assert whole.metrics["eval_nats_per_token"] > 0
    assert blockdiff.load_model(tmp_path / "whole").config.block_size == 8  # as the base's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_targets": "q_proj,nothing"}, "no linear map 'nothing'"),
        ({"init_from": "starter", "length": 16}, "adapted models"),
        ({"lora": 0}, "`lora` is 0"),
    ],
)
def test_bad_input(base: Path, tmp_path: Path, changes: dict, message: str) -> None:
    options = {
        "data": str(base.parent / "text.txt"), "out": str(tmp_path / "run"),
        "init_from": str(base), "lora": 4, "length": 16, "steps": 1, "report_to": "none",
    }  # fmt: skip
    with pytest.raises(blockdiff.InputError, match=message):
        blockdiff.train(blockdiff.TrainConfig(**(options | changes)), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prediction", ["same", "shift"])
def test_a_folder_that_is_no_ar_model_says_so_in_transformers(
    base: Path, tmp_path: Path, prediction: str
) -> None:
    lm = AutoModelForCausalLM.from_pretrained(base)
    model = blockdiff.adapt(lm, mask_token_id=model_mask(base), prediction=prediction)
    blockdiff.save_model(model, tmp_path / "model")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        by_transformers = [str(w.message) for w in said if "prediction same" in str(w.message)]
        blockdiff.load_model(tmp_path / "model")
    assert len(by_transformers) == (prediction == "same")
    assert sum("prediction same" in str(w.message) for w in said) == len(by_transformers)


def model_mask(folder: Path) -> int:
    return blockdiff.load_model(folder).config.mask_token_id


def test_what_is_not_compiled_says_so(base: Path) -> None:
    with pytest.raises(blockdiff.InputError, match="package's own networks"):
        blockdiff.load_model(base).compile_layers()
