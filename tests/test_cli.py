"""The command line as a person meets it: help, errors of one line, exit codes, JSON."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from blockdiff import cli
from blockdiff.commands import COMMANDS
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.hub import save_model
from blockdiff.training.checkpoints import newest_checkpoint
from blockdiff.training.config import TrainConfig

TEXT = "A block of masked tokens is filled in by the network, one token after another. " * 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 300)
    config = DiTConfig(
        len(tokenizer), 16, 4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        cond_size=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(DiT(config), folder, tokenizer)
    return folder


@pytest.fixture
def copied_model(model_folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs a command that must be refused; its one line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("blockdiff: error: "), printed.err
    assert "Traceback" not in printed.err
    return lines[0]


# help


def test_help_names_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], *([name] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        if words == ["train"]:
            for field in fields(TrainConfig):
                assert f"--{field.name.replace('_', '-')}" in text
            assert "Block size L'" in text, "the attribute's text is its help"


def test_options_are_few_and_known() -> None:
    """A new option is a decision: it changes this test."""
    counts = {name: len(command.options) for name, command in COMMANDS.items()}
    assert counts == {
        "train": 53, "evaluate": 23, "zero-shot": 12, "variance": 23, "evaluate-samples": 13,
        "generate": 23, "tokenizer": 5, "benchmark": 15, "reproduce": 6, "demo": 5,
    }  # fmt: skip


def test_help_is_quick_to_load() -> None:
    """Help imports neither torch nor transformers."""
    code = (
        "import sys; from blockdiff import cli; cli._help(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# errors


def test_unknown_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--block-size" in refused(capsys, "train", "--blocksize", 4)
    assert "--temperature" in refused(capsys, "generate", "x", "--temprature", 1)
    assert "--steps cannot be 'many'; expected a whole" in refused(
        capsys, "train", "--steps", "many"
    )
    assert "choose one of" in refused(capsys, "train", "--objective", "sed")
    assert "--length is -128; it must be at least 1" in refused(capsys, "train", "--length", -128)
    assert "does not divide" in refused(capsys, "train", "--block-size", 5)
    refused(capsys, "trian")
    refused(capsys)


def test_bad_corpora(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"

    def train_on(name: str, content: bytes | None) -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        message = refused(capsys, "train", "--data", path, "--out", out, "--vocab-size", 300)
        assert not out.exists(), "nothing is written before the input is known to be good"
        return message

    assert "missing.txt" in train_on("missing.txt", None)
    assert "empty.txt" in train_on("empty.txt", b"")
    assert "UTF-8" in train_on("latin.txt", "Müller".encode("latin-1"))
    assert "columns.jsonl" in train_on("columns.jsonl", b'{"body": "no text"}\n')
    assert "tokens" in train_on("short.txt", b"Too short for a window. But two sentences.")


def test_bad_model_folders(
    capsys: pytest.CaptureFixture[str], copied_model: Path, tmp_path: Path
) -> None:
    def generate() -> str:
        return refused(capsys, "generate", copied_model)

    weights = copied_model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "truncated" in generate()
    weights.unlink()
    assert "no model.safetensors" in generate()
    (copied_model / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickled" in generate()
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "output.linear.bias": tensors["output.linear.bias"][:-1]}, weights)
    assert "output.linear.bias has shape [299]" in generate()
    save_file({k: v for k, v in tensors.items() if k != "output.linear.bias"}, weights)
    assert "output.linear.bias is missing" in generate()
    weights.write_bytes(whole)
    (copied_model / "config.json").write_text("{")
    assert "not valid JSON" in generate()
    assert "no folder" in refused(capsys, "generate", tmp_path / "nowhere")


def test_a_tokenizer_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    train_tokenizer([TEXT + "Quite other words: jumping foxes, lazy dogs."], 330).save_pretrained(
        tmp_path / "big"
    )
    words = ("--tokenizer", tmp_path / "big")
    assert "leave --tokenizer out" in refused(capsys, "generate", model_folder, *words)
    assert "leave --tokenizer out" in refused(
        capsys, "evaluate", model_folder, "--data", corpus, *words
    )


def test_bad_prompts_and_sampling(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    assert "mask token" in refused(capsys, "generate", model_folder, "--prompt", "a <|mask|>")
    assert "top-p" in refused(capsys, "generate", model_folder, "--top-p", 1.5)
    assert "at least 1" in refused(capsys, "generate", model_folder, "--max-new-tokens", 0)
    assert "number of steps" in refused(capsys, "generate", model_folder, "--sampler", "ancestral")
    assert "choose one of" in refused(capsys, "generate", model_folder, "--sampler", "best")


def test_biased_draws_are_no_perplexity(
    capsys: pytest.CaptureFixture[str], model_folder: Path, corpus: Path
) -> None:
    words = ("evaluate", model_folder, "--data", corpus, "--estimator", "clipped")
    assert "choose one of auto, enumerate" in refused(capsys, *words)


def test_a_full_disk_while_saving_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The earlier checkpoint stays whole and the run goes on from it."""
    from blockdiff.training import trainer

    real = trainer.save_file

    def full(tensors: object, path: Path, **more: object) -> None:
        if path.parent.name == "checkpoint-2":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **more)

    monkeypatch.setattr(trainer, "save_file", full)
    run = ["train", "--out", tmp_path / "run"]
    options = ["--data", corpus, "--vocab-size", 270, "--length", 16, "--steps", 3, "--ema", 0.9,
               "--batch-size", 2, "--save-every", 1, "--report-to", "none"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in [*run, *options]])
    assert stop.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    monkeypatch.setattr(trainer, "save_file", real)
    cli.main([str(word) for word in [*run, "--resume"]])
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockdiff.writing.load", interrupt)
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", str(model_folder)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "blockdiff: error: interrupted\n"


# what the commands print


def test_generate_json(capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    words = ["generate", model_folder, "--json", "--prompt", "A block of", "--samples", 2]
    cli.main([str(word) for word in [*words, "--max-new-tokens", 10, "--seed", 3]])
    record = json.loads(capsys.readouterr().out)
    assert len(record["texts"]) == len(record["nfe"]) == 2
    assert record["tokens"] == [10, 10] and record["tokens_per_second"] > 0
    assert record["options"]["seed"] == 3


def test_generate_text_is_alone_on_standard_output(
    capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = ["generate", model_folder, "--prompt", "A block", "--max-new-tokens", 8]
    cli.main([str(word) for word in [*words, "--page", page]])
    printed = capsys.readouterr()
    assert printed.out.startswith("A block")
    assert "tokens/s" in printed.err and "tokens/s" not in printed.out
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert "exists" in refused(capsys, *words, "--page", page)


def test_evaluate_json_per_token_and_per_byte(
    capsys: pytest.CaptureFixture[str], model_folder: Path, corpus: Path
) -> None:
    cli.main(["evaluate", str(model_folder), "--data", str(corpus), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["estimator"] == "enumerate" and record["mask_stderr"] == 0
    assert record["bits_per_byte"] == pytest.approx(
        record["bits_per_token"] * record["tokens_per_byte"]
    )
    # An untrained network is close to uniform over its vocabulary, less the mask token.
    assert record["perplexity"] == pytest.approx(299, rel=0.05)
    cli.main(["evaluate", str(model_folder), "--data", str(corpus)])
    assert "perplexity" in capsys.readouterr().out


def test_tokenizer_command_and_yaml(
    capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path
) -> None:
    config = tmp_path / "tokenizer.yaml"
    config.write_text(f"data: {corpus}\nout: {tmp_path / 'words'}\nvocab_size: 270\n")
    cli.main(["tokenizer", "--config", str(config)])
    assert "270 tokens" in capsys.readouterr().out
    assert "--overwrite" in refused(capsys, "tokenizer", "--config", config)
