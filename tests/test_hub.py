"""What a model folder may hold, and what opening it may cost."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import blockdiff
from blockdiff import load_model, save_model
from blockdiff.errors import InputError
from blockdiff.models import loading
from helpers import read_golden, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model(vocab_size=9, length=16), tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def deep(levels: int = 100_000) -> str:
    return "[" * levels + "]" * levels


SIZES = ("vocab_size", "length", "block_size", "hidden_size", "num_hidden_layers",
         "num_attention_heads", "cond_size")  # fmt: skip


@pytest.mark.parametrize("name", [*SIZES, "dropout", "mask_token_id", "clip"])
@pytest.mark.parametrize(
    "value", ["many", [], {}, -1, 10**6, 10**12, 1e20, float("nan"), [[1]], "1"]
)
def test_a_field_of_another_kind_is_one_line(folder: Path, name: str, value: object) -> None:
    """Or is right; and in no case is memory taken for what the configuration asks for."""
    change(folder, **{name: value})
    try:
        load_model(folder)
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "fields", [{"vocab_size": 20_000_000}, {"num_hidden_layers": 10**6}, {"hidden_size": 2**20}]
)
def test_nothing_is_allocated_before_config_and_weights_agree(
    folder: Path, fields: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder, **fields)
    real = torch.empty

    def modest(*size: object, **options: object) -> torch.Tensor:
        made = real(*size, **options)
        assert made.device.type == "meta" or made.numel() < 2**20
        return made

    monkeypatch.setattr(torch, "empty", modest)
    with pytest.raises(InputError, match=r"config\.json|num_hidden_layers"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", deep(), "\xff", '{"model_type": {}}'])
def test_a_config_that_is_none_is_one_line(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="config"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["output.linear.weight"][0, 0] = value
    save_file(weights, path)
    with pytest.raises(InputError, match=r"output\.linear\.weight holds numbers that are not"):
        load_model(folder)


def test_what_lies_beside_the_weights_is_no_part_of_them(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(other, folder / "model_old.safetensors")
    save_file(other, folder / "model-00009-of-00009.safetensors")
    opened = load_model(folder).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in weights.items())


def test_an_index_names_its_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: weights[name] for name in own}, folder / shard)
    index = folder / "model.safetensors.index.json"
    places = {name: shard for shard, own in shards.items() for name in own}
    index.write_text(json.dumps({"weight_map": places}))
    opened = load_model(folder).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in weights.items())
    for bad in ({}, {"weight_map": []}, {"weight_map": {"x": "../a.safetensors"}},
                {"weight_map": {"x": "gone.safetensors"}}, {"weight_map": {"x": 1}}):  # fmt: skip
        index.write_text(json.dumps(bad))
        with pytest.raises(InputError, match="index"):
            load_model(folder)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_written_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save_model(tiny_model(), tmp_path / "model")
    finally:
        os.umask(before)
    for path in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


def test_a_released_model_that_is_fed_the_time_says_what_it_is(tmp_path: Path) -> None:
    """SEDD and a time-conditioned MDLM have the same configuration and the same names."""
    config, weights, _ = read_golden("sedd_backbone")
    save_file(weights, tmp_path / "model.safetensors")
    for parameterization, kind in (("sedd", "sedd"), ("subs", "mdlm")):
        text = json.dumps(config | {"parameterization": parameterization})
        (tmp_path / "config.json").write_text(text)
        assert load_model(tmp_path).config.kind == kind
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="parameterization"):
        load_model(tmp_path)


def test_a_released_model_of_several_blocks_that_is_fed_the_time_is_refused(tmp_path: Path) -> None:
    config, weights, _ = read_golden("bd3lm_block4")
    save_file(weights, tmp_path / "model.safetensors")
    config |= {"time_conditioning": True, "parameterization": "subs"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="clean stream"):
        load_model(tmp_path)


@pytest.mark.parametrize("mask", [0, 103, 199])
@pytest.mark.parametrize("layout", ["bd3lm_block4", "mdlm", "ar"])
def test_a_released_models_mask_is_its_tokenizers(tmp_path: Path, layout: str, mask: int) -> None:
    """BERT's is 103, not the last; where the configuration names one, it has the last word."""
    config, weights, _ = read_golden(layout)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = {f"w{i}" if i != mask else "[MASK]": i for i in range(config["vocab_size"])}
    backend = Tokenizer(WordLevel(words, unk_token="[MASK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", eos_token=f"w{(mask + 1) % 200}"
    ).save_pretrained(tmp_path / "words")
    model, tokenizer = blockdiff.load(tmp_path, tokenizer=tmp_path / "words")
    assert model.config.mask_token_id == tokenizer.mask_token_id == mask
    save_model(model, tmp_path / "saved")
    assert load_model(tmp_path / "saved").config.mask_token_id == mask
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": 5}))
    if layout != "ar":
        with pytest.raises(InputError, match="mask token has id"):
            blockdiff.load(tmp_path, tokenizer=tmp_path / "words")


def test_a_model_opens_where_the_command_line_would_put_it(monkeypatch):
    asked = []

    def choose(name):
        asked.append(name)
        return torch.device("meta")

    monkeypatch.setattr(loading, "choose_device", choose)
    model, _ = blockdiff.load("starter")
    assert asked == ["auto"] and model.device.type == "meta"
    monkeypatch.undo()
    assert blockdiff.load("starter", device="cpu")[0].device.type == "cpu"
    with pytest.raises(InputError, match="`device` 'abacus' cannot be used here"):
        blockdiff.load("starter", device="abacus")
