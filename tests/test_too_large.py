"""A model that is too large for memory: said in one line before any of it is read."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

import blockdiff
from blockdiff import cli
from blockdiff.models import tensors
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.loading import load_in

STARTER = Path(blockdiff.__file__).parent / "starter"


@pytest.fixture(scope="module")
def enormous(tmp_path_factory):
    """1.9 TB by its header and its file's length, of which next to nothing is on the disk."""
    folder = tmp_path_factory.mktemp("enormous") / "model"
    shutil.copytree(STARTER, folder)
    wide = {"hidden_size": 3 * 2**15, "num_hidden_layers": 8}
    config = json.loads((STARTER / "config.json").read_text()) | wide
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        network = DiT(DiTConfig.from_dict(config))
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


COMMANDS = {
    "serve": ["--port", "0"],
    "generate": ["A", "--precision", "bf16"],
    "chat": [],
    "score": ["--context", "a", "--continuation", "b"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it_with_both_numbers(command, enormous, capsys):
    if command == "serve":
        pytest.importorskip("uvicorn")
        pytest.importorskip("prometheus_client")
    with pytest.raises(SystemExit) as end:
        cli.main([command, str(enormous), *COMMANDS[command]])
    *_, line = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    takes = "1856.2 GB in bfloat16" if command == "generate" else "GB in "
    assert takes in line and "GB of memory are free; a smaller model" in line


def test_what_fits_in_bf16_is_told_and_then_opened(monkeypatch, capsys):
    numbers = sum(p.numel() for p in blockdiff.load_model("starter").parameters())
    monkeypatch.setattr(tensors, "free_memory", lambda devices: 3 * numbers)
    with pytest.raises(SystemExit):
        cli.main(["generate", "starter", "A", "--precision", "float32"])
    assert "free; in bf16 they take 0.0: give --precision bf16" in capsys.readouterr().err
    model, _, precision = load_in("starter", "bf16", "cpu")
    assert precision == "bf16" and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_weights_are_those_of_a_model_opened_in_float32(precision):
    from blockdiff.models.weights import convert

    own, words, said = load_in("starter", precision, "cpu")
    other, _ = blockdiff.load("starter", device="cpu")
    convert(other, precision, other.device)
    assert said == precision and words.mask_token_id == own.config.mask_token_id
    assert own.state_dict().keys() == other.state_dict().keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name
        assert own.state_dict()[name].dtype == tensor.dtype


def test_a_device_is_asked_before_the_model_is_moved_there(monkeypatch):
    free = {"cpu": 10**12, "meta": 7 * 10**6}  # meta in the place of a GPU
    monkeypatch.setattr(tensors, "free_memory", lambda devices: free[devices[0].type])
    with pytest.raises(blockdiff.InputError, match=r"and 0\.0 GB of memory are free"):
        blockdiff.load("starter", device="meta")
    free["meta"] = 10**12
    assert blockdiff.load("starter", device="meta")[0].device.type == "meta"
