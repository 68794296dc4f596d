"""A program without an extra: one line says which to install, before any work; exit code 2."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import blockdiff
from blockdiff import cli
from blockdiff.errors import InputError, need
from test_packaging import EXTRAS, distribution, names

SOURCE = Path(blockdiff.__file__).parent


def test_need_gives_the_module_or_says_what_to_install(tmp_path, monkeypatch):
    assert need("json", "json.decoder", extra="serve", what="it").__name__ == "json"
    with pytest.raises(InputError) as missing:
        need("json", "no_such_module.part", extra="serve", what="it")
    assert str(missing.value) == "it needs no_such_module: pip install 'blockdiff[serve]'"
    monkeypatch.setitem(sys.modules, "hidden_away", None)
    with pytest.raises(InputError, match=r"it needs hidden_away: pip .*\[ray\]"):
        need("hidden_away", extra="ray", what="it")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_there.py").write_text("import absent_part")
    with pytest.raises(InputError, match=r"it needs absent_part: pip"):
        need("half_there", extra="ray", what="it")
    (tmp_path / "built_wrong.py").write_text("raise ImportError('libx.so: cannot open')")
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"it needs built_wrong \(libx.so: cannot open\): pip"):
        need("built_wrong", extra="ray", what="it")


def calls_of_need():
    """(file, modules, extra) of every `need(…)` in the package."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need":
                (extra,) = (word.value for word in node.keywords if word.arg == "extra")
                yield path.name, [ast.literal_eval(word) for word in node.args], extra.value


def test_every_extra_that_is_named_installs_what_is_missing():
    calls = list(calls_of_need())
    assert len(calls) >= 4
    for file, modules, extra in calls:
        for module in modules:
            assert distribution(module.partition(".")[0]) in names(EXTRAS[extra]), (file, module)


# A command that needs an extra, the module it lacks, and the extra.
COMMANDS = [
    ("serve starter --port 0", "fastapi", "serve"),
    ("serve starter --port 0", "prometheus_client", "serve"),
    ("generate starter It --max-new-tokens 1 --regex a", "llguidance", "constrain"),
    ("evaluate-samples texts.jsonl --judge x --reference y --mauve", "mauve", "eval"),
    ("train texts.jsonl --init-from {adapted} --lora 2 --out out", "peft", "adapt"),
    ("train texts.jsonl --report-to wandb --out out", "wandb", "wandb"),
]


@pytest.mark.parametrize(("words", "module", "extra"), COMMANDS, ids=lambda part: part.split()[0])
def test_a_command_says_which_extra_it_needs(
    words, module, extra, tmp_path, monkeypatch, capsys, adapted
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    Path("texts.jsonl").write_text('{"text": "some words of a text"}\n' * 20)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as left:
        cli.main(words.format(adapted=adapted).split())
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1, told
    assert told.endswith(f"needs {module}: pip install 'blockdiff[{extra}]'\n")
    assert not Path("out").exists()


# What the extras and dev bring along, as far as something might import it.
BEYOND = (
    "evaluate faiss fastapi hypothesis IPython llguidance lm_eval mauve mkdocs nltk openai peft "
    "playwright prometheus_client pydantic ray rouge_score sacrebleu scipy sklearn starlette "
    "uvicorn wandb"
)
ALONE = """
import sys
from importlib.machinery import PathFinder
from blockdiff import cli

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in BEYOND
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Core
cli.main("train texts.jsonl --preset nano --vocab-size 270 --length 16 --steps 2 --batch-size 2 "
         "--eval-windows 2 --block-size 4 --out run".split())
cli.main("evaluate run texts.jsonl --windows 2".split())
cli.main("generate run some --max-new-tokens 4".split())
print("loaded", *set(BEYOND) & set(sys.modules))
"""


def test_the_core_alone_trains_evaluates_and_generates(tmp_path):
    """Without any extra: a program where it was left out sees none of its modules."""
    (tmp_path / "texts.jsonl").write_text('{"text": "some words of a text"}\n' * 60)
    run = subprocess.run(
        [sys.executable, "-c", f"BEYOND = {BEYOND!r}.split()\n{ALONE}"], cwd=tmp_path,
        capture_output=True, text=True,
        env={**os.environ, "BLOCKDIFF_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("loaded\n") and "perplexity" in run.stdout
    assert list((tmp_path / "run" / "tensorboard").iterdir()), "the default log is kept"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    from blockdiff.data.tokenizers import train_tokenizer
    from blockdiff.models.loading import adapt_folder

    folder = tmp_path_factory.mktemp("adapted")
    tokenizer = train_tokenizer(["some words of a text"], 270)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes))
    lm.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    adapt_folder(str(folder / "lm"), str(folder / "out"), block_size=4)
    return folder / "out"
