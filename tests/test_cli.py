"""The command line as a person meets it: help, errors of one line, exit codes, JSON."""

import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from blockdiff import cli
from blockdiff.cli import parse
from blockdiff.commands import COMMANDS
from blockdiff.commands.options import as_typed
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
        "train": 69, "evaluate": 30, "score": 19, "zero-shot": 17, "variance": 29,
        "evaluate-samples": 45, "generate": 46, "chat": 39, "tokenizer": 5, "benchmark": 16,
        "reproduce": 6, "demo": 5, "adapt": 10, "export": 4, "infill": 38, "tune": 37,
        "draft-table": 15, "completion": 1, "serve": 16, "batch": 46,
    }  # fmt: skip


def test_help_is_quick_to_load() -> None:
    """Help imports neither torch nor transformers."""
    code = (
        "import sys; from blockdiff import cli; cli._help(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# what words mean


TEXTS = ["null", "~", "--item", "--json", "[a, b]", "{a: 1}", "3", "1e3", "true", "", " ", "- ",
         "- an item", "a: b", "'q", "#c", "é $x$ [b]", "a=b", "_"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_the_word_as_it_was_typed(text: str) -> None:
    assert parse(["generate", "m", "--prompt", text])[1].values["prompt"] == text
    assert parse(["generate", "m", f"--prompt={text}"])[1].values["prompt"] == text
    if not text.startswith("--"):
        assert parse(["generate", "m", text])[1].values["prompt"] == text
    assert parse(["generate", "m", "--", text])[1].values["prompt"] == text


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("train notes.txt", {"data": "notes.txt"}),
        ("train a.txt --steps 3 b.txt --data c", {"data": ["a.txt", "b.txt", "c"], "steps": 3}),
        ("generate starter Hello", {"model": "starter", "prompt": "Hello"}),
        ("generate --json starter Hello", {"model": "starter", "prompt": "Hello", "json": True}),
        ("generate Hello --model starter", {"model": "starter", "prompt": "Hello"}),
        ("evaluate starter notes.txt", {"model": "starter", "data": "notes.txt"}),
        ("evaluate starter a b --bos", {"model": "starter", "data": ["a", "b"], "bos": True}),
        ("zero-shot starter a b", {"model": "starter", "texts": ["a", "b"]}),
        ("zero_shot starter", {"model": "starter"}),
        ("tokenizer a --vocab_size 300", {"data": "a", "vocab_size": 300}),
        ("train --across-documents false --no-eos --adaln true --resume",
         {"across_documents": False, "eos": False, "adaln": True, "resume": True}),
        ("train --warmup 100", {"warmup": 100}),  # given, if at its default
    ],
)  # fmt: skip
def test_words_by_name_and_by_place(words: str, values: dict[str, object]) -> None:
    given = parse(words.split())[1]
    assert given.values == values and given.named == set(values)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_its_help_and_every_example_is_good(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert next(iter(COMMANDS[command].options)) in COMMANDS[command].sections
    for option in COMMANDS[command].options.values():
        assert option.help and not option.help.startswith("["), option.name
    anywhere = ("tokenizer", "reproduce", "adapt", "export", "completion")
    assert "device" in COMMANDS[command].options or command in anywhere
    assert COMMANDS[command].examples
    for example in COMMANDS[command].examples:
        words = shlex.split(example.split("|")[-1].split(">")[0])
        assert words[0] == "blockdiff" and parse(words[1:])[0] == command
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command].examples[0] in capsys.readouterr().out


def test_a_command_says_what_an_option_means_to_it() -> None:
    """Of a field that two dataclasses describe, the one that extends the other has the word."""
    assert "of an answer" in COMMANDS["chat"].options["max_new_tokens"].help
    assert "New tokens per row" in COMMANDS["generate"].options["max_new_tokens"].help
    assert "what its run held out" not in COMMANDS["draft-table"].options["part"].help


YAML = {
    "max-new-tokens: 3\nmodel: starter\ntop_p: 1e-1\n": {
        "max_new_tokens": 3, "model": "starter", "top_p": 0.1},
    "\ufeffmodel: m\nprompt: null\n": {"model": "m", "prompt": None},
    "model: m\nprompt: 'null'\n": {"model": "m", "prompt": "null"},
    "model: 2023-01-01\nprompt: 1e3\njson: yes\n": {
        "model": "2023-01-01", "prompt": "1e3", "json": True},
    "model: m\nstop: second_eos,low_entropy\n": {"model": "m", "stop": "second_eos,low_entropy"},
}  # fmt: skip


@pytest.mark.parametrize("text", YAML)
def test_a_yaml_file_says_what_the_command_line_says(text: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    assert parse(["generate", "--config", str(path)])[1].values == YAML[text]
    # The command line has the last word, and a later file one before it.
    second = tmp_path / "second.yaml"
    second.write_text("model: second\nseed: 7\n")
    words = ["generate", "third", "--config", str(path), "--config", str(second)]
    assert parse(words)[1].values == YAML[text] | {"model": "third", "seed": 7}


def test_a_yaml_list_is_several_values(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("data: [a.txt, 'b.txt']\nlr: 1e-3\n")
    given = parse(["train", "--config", str(path)])[1]
    assert given.values == {"data": ["a.txt", "b.txt"], "lr": 0.001}


# errors


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt: caf\xe9\n".encode("latin-1"), "not valid UTF-8"),
        (b"gen-length: 3\n", "unknown key gen-length; did you mean max-new-tokens?"),
        (b"model: m\nmodel: n\n", "line 2: model is there twice"),
        (b"[a, b]\n", "holds no keys"),
        (b"- a\n", "holds no keys"),
        (b"text", "holds no keys"),
        (b"a: [b\n", "not valid YAML, line 2"),
        (b"a: \x00\n", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"? [a]\n: b\n", "a key must be text"),
        (b"prompt: [a, b]\n", "no single value"),
        (b"prompt: {a: b}\n", "no single value"),
        (b"seed: null\n", "seed is null"),
        (b"seed: many\n", "--seed cannot be 'many'"),
        (b"sampler: bset\n", "--sampler"),
        (b"json: 3.5\n", "--json cannot be '3.5'; expected true or false"),
        (None, "No such file"),
    ],
)
def test_bad_config_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "options.yaml"
    if content is not None:
        path.write_bytes(content)
    line = refused(capsys, "generate", "starter", "--config", path)
    assert words in line
    assert str(path) in line or "--" in words


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("train --learning-rate 1", "--lr"),
        ("train --learning_rate=1", "--lr"),
        ("train --max_steps 3", "--steps"),
        ("train --output_dir x", "--out"),
        ("train --gradient-accumulation-steps 2", "--accumulate"),
        ("train --per-device-train-batch-size 2", "--batch-size"),
        ("train --blocksize 4", "--block-size"),
        ("train -o x", "--out"),
        ("generate m --gen-length 3", "--max-new-tokens"),
        ("generate m --block-length 3", "--block-size"),
        ("generate m --temprature 1", "--temperature"),
        ("generate m --num-return-sequences 2", "--samples"),
        ("evaluate m --dataset x", "--data"),
        ("sample m", "generate"),
        ("eval m", "evaluate"),
        ("trian", "train"),
        ("train --zzz 3", None),
        ("generate m --quux", None),
        ("frobnicate", None),
        ("--frobnicate", None),
    ],
)
def test_unknown_names_get_a_hint_where_one_is_near(
    capsys: pytest.CaptureFixture[str], words: str, hint: str | None
) -> None:
    line = refused(capsys, *words.split())
    assert line.startswith("blockdiff: error: unknown ")
    assert line.endswith(f"did you mean {hint}?") if hint else "did you mean" not in line


def test_bad_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps cannot be 'many'; expected a whole" in refused(
        capsys, "train", "--steps", "many"
    )
    for value in ("1e3", "3.0", "0x10", "", "1" * 5000, "nan"):
        assert "--steps cannot be" in refused(capsys, "train", f"--steps={value}")
    assert "choose one of" in refused(capsys, "train", "--objective", "sed")
    assert "work cannot be 'trian'; choose one of train" in refused(capsys, "benchmark", "trian")
    assert "--length is -128; it must be at least 1" in refused(capsys, "train", "--length", -128)
    assert "does not divide" in refused(capsys, "train", "--block-size", 5)
    assert "--lr needs a value" in refused(capsys, "train", "--lr")
    assert "--out needs a value, not" in refused(capsys, "train", "--out", "--resume")
    assert "one argument too many" in refused(capsys, "generate", "m", "two", "words")
    assert "model is missing" in refused(capsys, "generate")
    assert "data is missing" in refused(capsys, "evaluate", "starter")
    assert "not valid UTF-8" in refused(capsys, "generate", "m", "--prompt", "caf\udce9")
    assert "not valid UTF-8" in refused(capsys, "generate", "m", "caf\udce9")
    assert "name a command" in refused(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_advice_names_only_what_the_command_has(command: str) -> None:
    options = COMMANDS[command].options
    for name, advice in (("text_column", ", or name it as"), ("mask_token", "; name a new one as")):
        said = as_typed(f"no such thing{advice} `{name}`; its `length`", COMMANDS[command])
        assert ("--" + name.replace("_", "-") in said) == (name in options)
        assert said.startswith("no such thing") and "`" not in said
        assert ("name" in said) == (name in options)


def test_what_cannot_be_meant_is_refused_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom blockdiff import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    )
    for words in (
        ["train", "--objective", "sed"],
        ["evaluate", "m", "d", "--precision", "fp8"],
        ["generat"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_stream_that_cannot_encode_a_character_replaces_it(model_folder: Path) -> None:
    import os

    command = [sys.executable, "-m", "blockdiff", "generate", str(model_folder), "café"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "2"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"caf?" in done.stdout


def test_a_command_leaves_the_libraries_as_they_were(model_folder: Path) -> None:
    import warnings

    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), warnings.showwarning
    filters = list(warnings.filters)
    cli.main(["generate", str(model_folder), "--max-new-tokens", "1"])
    after = logging.get_verbosity(), logging.is_progress_bar_enabled(), warnings.showwarning
    assert before == after and warnings.filters == filters


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
    assert "give --steps" in refused(capsys, "generate", model_folder, "--sampler", "ancestral")
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
    from blockdiff.training import base

    real = base.save_file

    def full(tensors: object, path: Path, **more: object) -> None:
        if path.parent.name == "checkpoint-2":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **more)

    monkeypatch.setattr(base, "save_file", full)
    run = ["train", "--out", tmp_path / "run"]
    options = ["--data", corpus, "--vocab-size", 270, "--length", 16, "--steps", 3, "--ema", 0.9,
               "--batch-size", 2, "--save-every", 1, "--report-to", "none"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in [*run, *options]])
    assert stop.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-1"
    monkeypatch.setattr(base, "save_file", real)
    cli.main([str(word) for word in [*run, "--resume"]])
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blockdiff.writing.load_in", interrupt)
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
