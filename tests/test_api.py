"""What a caller is promised: texts as the tokenizer joins them, ids that are words."""

import doctest
import inspect
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import blockdiff
from blockdiff.api import continuation, merge_options
from blockdiff.errors import InputError
from blockdiff.models.hub import save_model
from blockdiff.models.loading import drawable, load
from blockdiff.replay import Event, Recording
from blockdiff.sampling.options import SamplingKeywords, SamplingOptions
from helpers import tiny_model

WORDS = ["the", "people", "of", "land", "law", "##s"]


def word_piece() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[MASK]", "[SEP]", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]"
    )


def sentence_piece() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("<mask>", 0.0), ("</s>", 0.0)]
    pieces += [(f"▁{word.strip('#')}", -1.0) for word in WORDS] + [("s", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", eos_token="</s>"
    )


@pytest.mark.parametrize("make", [word_piece, sentence_piece])
@pytest.mark.parametrize(
    ("prompt", "whole"),
    [
        ("the people of", "the people of the land"),
        ("", "the land"),
        ("the law", "the laws of the land"),
        ("the people of the law of the people of the law", "the people of the law of the people of"
         " the law of the land"),
    ],
)  # fmt: skip
def test_prompt_and_text_read_as_they_were_written(make, prompt: str, whole: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(whole, add_special_tokens=False)
    first = len(tokenizer.encode(prompt, add_special_tokens=False)) if prompt else 0
    if make is sentence_piece and prompt == "the law":
        ids = [*ids[:2], tokenizer.convert_tokens_to_ids("s"), *ids[3:]]
    assert prompt + continuation(tokenizer, ids[:first], ids[first:]) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == whole


def test_ids_without_a_token_are_never_drawn(tmp_path) -> None:
    """A vocabulary is often padded to a round size: its other ids are no words."""
    tokenizer = word_piece()
    model = tiny_model(vocab_size=64, length=16, mask_token_id=tokenizer.mask_token_id)
    with torch.no_grad():
        model.output.linear.bias[len(tokenizer) :] = 50.0
    save_model(model, tmp_path, tokenizer)
    opened, own = load(tmp_path)
    assert drawable(own, 64).sum() == len(tokenizer)
    for options in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}):
        done = blockdiff.generate(opened, "the", tokenizer=own, max_new_tokens=24, **options)
        assert max(done.tokens[0]) < len(tokenizer)


def test_another_tokenizer_is_refused_whatever_its_size(tmp_path) -> None:
    own = word_piece()
    model = tiny_model(vocab_size=64, length=16, mask_token_id=own.mask_token_id)
    save_model(model, tmp_path / "model", own)
    for number, vocabulary in enumerate((WORDS[::-1], [*WORDS, "more"], WORDS[:3])):
        ids = {w: i for i, w in enumerate(["[UNK]", "[MASK]", "[SEP]", *vocabulary])}
        other = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        PreTrainedTokenizerFast(
            tokenizer_object=other, unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]"
        ).save_pretrained(tmp_path / str(number))
        with pytest.raises(InputError, match="not the one"):
            load(tmp_path / "model", tokenizer=tmp_path / str(number))
    load(tmp_path / "model", tokenizer=tmp_path / "model")


HOSTILE_TEMPERATURES = [math.inf, -math.inf, math.nan, -1.0, -1e-320, "1", None, True, [1.0]]


@pytest.mark.parametrize("temperature", HOSTILE_TEMPERATURES)
def test_a_temperature_that_is_none_is_refused(temperature: object) -> None:
    model = tiny_model(vocab_size=9, length=16)
    with pytest.raises(InputError, match="`temperature`"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-38, 1e-10, 1e30])
def test_every_temperature_draws_within_the_vocabulary(temperature: float) -> None:
    model = tiny_model(vocab_size=9, length=16)
    for kind in ({}, {"top_p": 0.5}, {"top_k": 2}):
        done = blockdiff.generate(model, [[1]], max_new_tokens=8, temperature=temperature, **kind)
        assert all(0 <= token < 8 for token in done.tokens[0])
    if temperature < 1e-9:
        greedy = blockdiff.generate(model, [[1]], max_new_tokens=8, temperature=0.0)
        cold = blockdiff.generate(model, [[1]], max_new_tokens=8, temperature=temperature)
        assert cold.tokens == greedy.tokens


@pytest.mark.parametrize("block_size", [0, -4, 3, 2.0, "4", True])
def test_a_block_size_that_is_none_is_refused(block_size: object) -> None:
    model = tiny_model(vocab_size=9, length=16)
    with pytest.raises(InputError, match="block"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, block_size=block_size)
    with pytest.raises(InputError, match="block"):
        blockdiff.likelihood(model, torch.ones(1, 16, dtype=torch.int64), block_size=block_size)


def test_a_block_size_the_model_was_not_trained_for_is_said() -> None:
    model = tiny_model(vocab_size=9, length=16)
    with pytest.warns(UserWarning, match="trained with block size 4, not 8"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, block_size=8)


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud800", "a\udfffb"])
def test_a_prompt_that_is_no_text_is_refused(prompt: str) -> None:
    model, tokenizer = blockdiff.load("starter")
    with pytest.raises(InputError, match="UTF-8"):
        blockdiff.generate(model, prompt, tokenizer=tokenizer, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "changes", "wanted"),
    [
        (None, {"seed": 2}, SamplingOptions(seed=2)),
        (SamplingOptions(seed=1, top_k=3), {}, SamplingOptions(seed=1, top_k=3)),
        (SamplingOptions(seed=1, top_k=3), {"seed": 0}, SamplingOptions(seed=0, top_k=3)),
        ({"seed": 1, "top_k": 3}, {"top_k": None}, SamplingOptions(seed=1)),
    ],
)
def test_options_and_keywords_merge(options, changes, wanted) -> None:
    assert merge_options(options, **changes) == wanted


WRONG_CALLS = [
    ({"options": 3}, "a SamplingOptions or a mapping"),
    ({"options": {"max_tokens": 3}}, "no sampling option 'max_tokens'; there are max_new_tokens"),
    ({"max_length": 3}, "no sampling option 'max_length'"),
    ({"schedule": "cosin"}, "`schedule` 'cosin' is unknown; choose one of linear, cosine"),
    ({"sampler": None}, "`sampler`"),
    ({"stop": "never"}, "`stop`"),
    ({"stop": ""}, "`stop`"),
    ({"stop": None}, "`stop`"),
    ({"rows": [1, 2]}, "`rows` numbers 2 rows, but there are 1"),
    ({"rows": []}, "`rows` numbers 0 rows"),
    ({"rows": 3}, "`rows` is int"),
    ({"rows": "1"}, "`rows` is str"),
    ({"rows": [-1]}, "`rows` is -1"),
    ({"rows": [0.0]}, "`rows`"),
    ({"tokenizer": "starter"}, "`tokenizer` is str"),
    ({"prompts": [1, 2]}, r"\[\[1, 2, 3\]\]"),
    ({"prompts": torch.tensor([1, 2])}, r"\[\[1, 2, 3\]\]"),
    ({"prompts": torch.tensor([[0.5]])}, "a row with 0.5"),
    ({"prompts": [[0.5]]}, "a row with 0.5"),
    ({"prompts": [[True]]}, "a row with True"),
    ({"prompts": [["1"]]}, "a row with '1'"),
    ({"prompts": 3}, "`prompts` holds int"),
    ({"prompts": 0.5}, "`prompts` holds float"),
    ({"prompts": [None]}, "`prompts` holds NoneType"),
    ({"prompts": b"text"}, "`prompts` holds bytes"),
    ({"prompts": {"input_ids": [[1]]}}, "give its input_ids"),
    ({"prompts": [{"input_ids": [1]}]}, "give its input_ids"),
    ({"prompts": []}, "no prompt"),
    ({"prompts": [[]]}, "empty prompt"),
    ({"prompts": [[99]]}, "outside the model's vocabulary"),
    ({"prompts": [[-1]]}, "outside the model's vocabulary"),
    ({"prompts": [[10**30]]}, "outside the model's vocabulary"),
    ({"prompts": "text"}, "needs the model's tokenizer"),
    ({"model": (1, 2)}, "`model` is tuple"),
    ({"model": "starter"}, "`model` is str"),
    ({"model": None}, "`model` is NoneType"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG_CALLS, ids=lambda x: str(x)[:30])
@pytest.mark.parametrize("call", [blockdiff.generate, blockdiff.stream])
def test_what_is_no_call_is_refused_at_once(call, wrong, words) -> None:
    given = {"model": tiny_model(vocab_size=9, length=16), "prompts": [[1]], **wrong}
    with pytest.raises(InputError, match=words) as refused:
        call(given.pop("model"), given.pop("prompts"), **{"max_new_tokens": 1, **given})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "prompts", [[[1, 2]], ((1, 2),), torch.tensor([[1, 2]]), np.array([[1, 2]], np.int32),
                [torch.tensor([1, 2])], iter([[1, 2]])],
    ids=lambda prompts: type(prompts).__name__,
)  # fmt: skip
def test_rows_of_ids_in_every_shape(prompts) -> None:
    model = tiny_model(vocab_size=9, length=16)
    done = blockdiff.generate(model, prompts, max_new_tokens=np.int64(3), rows=np.array([5]))
    assert done.tokens == blockdiff.generate(model, [[1, 2]], max_new_tokens=3, rows=[5]).tokens


@pytest.mark.parametrize("call", [blockdiff.generate, blockdiff.stream, merge_options])
def test_keywords_are_seen(call, tmp_path: Path) -> None:
    names = [field.name for field in fields(SamplingOptions)]
    assert list(SamplingKeywords.__annotations__) == names
    if call is not merge_options:
        shown = inspect.signature(call).parameters
        assert set(names) < set(shown) and shown["max_new_tokens"].default == 128
        assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


def test_a_type_checker_sees_wrong_keywords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("mypy.api")
    code = tmp_path / "call.py"
    code.write_text(
        "from typing import Unpack\n"
        "from blockdiff.sampling.options import SamplingKeywords\n"
        "def call(**changes: Unpack[SamplingKeywords]) -> None: ...\n"
        "call(max_new_tokens=3, top_p=None)\n"
        "call(max_tokens=3)\n"
        "call(seed='1')\n"
        "call(top_p_rule='best')\n"
    )
    # Of the package's own modules those of the options alone: the whole would take a minute.
    source, copy = Path(blockdiff.__file__).parent, tmp_path / "blockdiff"
    for name in ("checks.py", "errors.py", "sampling/options.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
    for folder in (copy, copy / "sampling"):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("MYPYPATH", str(tmp_path))
    # Nor what these import from elsewhere.
    words = ["--config-file", "", "--cache-dir", str(tmp_path / "cache"), "--no-site-packages"]
    out, _, _ = api.run([*words, str(code)])
    lines = [line.split(":") for line in out.splitlines() if " error: " in line]
    assert [line[1] for line in lines if Path(line[0]).name == "call.py"] == ["5", "6", "7"]


@pytest.mark.parametrize("name", blockdiff.__all__)
def test_every_public_name_has_an_example_that_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(blockdiff, name), name)
    assert example.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    assert not runner.run(example, out=said.append).failed, "".join(said)


RECORDING = Recording(["the", " <b>cat</b>\n"], [], 1, 2, 4, [Event(1, [1])], 1, 1.0)


@pytest.mark.parametrize(
    "shown",
    [
        blockdiff.TextGeneration([[1]], [1], ["eos"], 1.0, texts=["</pre><script>[b]$x"]),
        RECORDING,
    ],
    ids=["generation", "replay"],
)
def test_a_notebook_shows_it_with_its_text_escaped(shown) -> None:
    page = shown._repr_html_()
    assert "<script" not in page and "<b>" not in page
    assert "cat" in page or "&lt;/pre&gt;&lt;script&gt;[b]$x" in page


@pytest.mark.parametrize("first", ["import blockdiff", "import transformers.models.auto"])
def test_importing_the_package_is_enough_for_the_auto_classes(first: str, tmp_path: Path) -> None:
    save_model(tiny_model(vocab_size=9, length=16), tmp_path)
    code = f"""
import sys
{first}
import blockdiff
assert {first != "import blockdiff"} or "torch" not in sys.modules
from transformers import AutoConfig, AutoModel
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["DiTConfig", "DiT"], run.stderr
