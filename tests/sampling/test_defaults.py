"""What a folder's generation_config.json asks for, and who comes before it."""

import io
import json

import pytest
import torch
from transformers import GenerationConfig

import blockdiff
from blockdiff import SamplingOptions, cli
from blockdiff.commands.chat import ChatSampling
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.hub import load_model, save_model
from blockdiff.sampling.defaults import KEY, filled, options_for
from helpers import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the people of the United States and their law"] * 3, 280)


@pytest.fixture
def model(tokenizer):
    return tiny_model(
        len(tokenizer), 32, 4, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, mask_token_id=tokenizer.mask_token_id,
    )  # fmt: skip


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """Asks for two tokens a step, sharpened, in blocks of 2, and no end."""
    ask = {"sampler": "confidence", "tokens_per_step": 2, "temperature": 0.5, "block_size": 2}
    setattr(model.generation_config, KEY, ask | {"max_new_tokens": 6, "stop": "none"})
    save_model(model, tmp_path / "model", tokenizer)
    return tmp_path / "model"


THRESHOLD = {"sampler": "threshold", "threshold": 0.7, "temperature": 0.5}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({}, THRESHOLD),
        ({"seed": 3}, {**THRESHOLD, "seed": 3}),
        ({"temperature": 1.0}, {**THRESHOLD, "temperature": 1.0}),
        ({"threshold": 0.2}, {**THRESHOLD, "threshold": 0.2}),
        ({"threshold": None}, {"sampler": "threshold", "temperature": 0.5}),
        ({"sampler": "threshold"}, THRESHOLD),
        ({"steps": 2}, {**THRESHOLD, "steps": 2}),
        # another order, or what the folder's does not read: none of its settings
        ({"sampler": "first_hitting"}, {"temperature": 0.5}),
        ({"sampler": "auto"}, {"temperature": 0.5}),
        ({"margin": 0.3}, {"margin": 0.3, "temperature": 0.5}),
        ({"sampler": "ancestral", "steps": 3},
         {"sampler": "ancestral", "steps": 3, "temperature": 0.5}),
    ],
)  # fmt: skip
def test_the_caller_comes_first(model, told, wanted):
    model.generation_config.blockdiff = dict(THRESHOLD)
    assert options_for(model, told) == SamplingOptions(**wanted)


def test_steps_and_tokens_per_step_say_the_same(model):
    model.generation_config.blockdiff = {"sampler": "confidence", "tokens_per_step": 2}
    assert options_for(model, {"steps": 1}) == SamplingOptions(sampler="confidence", steps=1)


def test_a_folder_without_a_sampler_means_the_one_its_settings_imply(model):
    model.generation_config.blockdiff = {"entropy_bound": 0.3}
    assert options_for(model, {}).sampler == "entropy_bound"
    assert options_for(model, {"steps": 2}).entropy_bound == 0.3
    assert options_for(model, {"threshold": 0.3}).entropy_bound is None


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"sampler": "mine"}, "the sampler 'mine' is not registered.*`plugin`"),
        ({"sampler": ["x"]}, "`sampler` .* is unknown"),
        ({"threshold": 7}, "`threshold` is 7; it must be at most 1"),
        ({"threshold": 0.5, "margin": 0.5}, "no sampler reads"),
        ({"temprature": 1}, "has 'temprature', which is none of"),
        ([1], r"is \[1\]; it must hold sampling options"),
    ],
)
def test_what_cannot_be_meant_names_the_file(model, tokenizer, tmp_path, ask, words):
    model.generation_config.blockdiff = ask
    save_model(model, tmp_path, tokenizer)
    opened = load_model(tmp_path)
    words = f"^{tmp_path}/generation_config.json: .*{words}"
    with pytest.raises(InputError, match=words):
        blockdiff.generate(opened, [[1, 2]])
    with pytest.raises(InputError, match=words):
        opened.generate(torch.tensor([[1, 2]]))
    if "sampler" not in ask and "threshold" not in ask:
        return
    # Who says otherwise is not hindered, and whose own words are wrong is told of those.
    assert blockdiff.generate(opened, [[1, 2]], sampler="first_hitting", max_new_tokens=1)
    opened.generate(torch.tensor([[1, 2]]), sampler="first_hitting", max_new_tokens=1)
    with pytest.raises(InputError, match=r"^`margin` is 9"):
        blockdiff.generate(opened, [[1, 2]], sampler="margin", margin=9)


def test_python_takes_the_folders_defaults(folder):
    opened = load_model(folder)
    told = {"sampler": "confidence", "tokens_per_step": 2, "temperature": 0.5, "block_size": 2,
            "max_new_tokens": 6, "stop": "none"}  # fmt: skip
    wanted = blockdiff.generate(opened, [[1, 2, 3]], options=SamplingOptions(**told, seed=4))
    assert wanted.nfe[0] < 6
    done = blockdiff.generate(opened, [[1, 2, 3]], seed=4)
    assert (done.tokens, done.nfe) == (wanted.tokens, wanted.nfe)
    *_, step = blockdiff.stream(opened, [[1, 2, 3]], options={"seed": 4})
    assert step.tokens[0, 3:9].tolist() == wanted.tokens[0]
    # A SamplingOptions says everything.
    plain = SamplingOptions(max_new_tokens=6, stop="none", seed=4)
    bare = tiny_model(opened.config.vocab_size, 32, 4)
    bare.load_state_dict(opened.state_dict())
    expected = blockdiff.generate(bare, [[1, 2, 3]], options=plain).tokens
    assert blockdiff.generate(opened, [[1, 2, 3]], options=plain).tokens == expected


def test_transformers_words_are_for_transformers_alone(folder):
    path = folder / "generation_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"temperature": 0.01, "top_k": 1, "top_p": 0.1}))
    opened = load_model(folder)
    assert options_for(opened, {}).top_k is None and options_for(opened, {}).temperature == 0.5


def of_transformers(model, *config, **given):
    """The options that `model.generate` comes to."""
    from blockdiff.sampling import as_transformers as it

    wish = it._settings(model, config[0] if config else None, given)
    return it._options(wish, 2, {0})


def test_model_generate_reads_the_key_before_the_rest_of_the_file(model):
    model.generation_config = GenerationConfig(do_sample=False, top_p=0.9, max_new_tokens=9)
    model.generation_config.blockdiff = dict(THRESHOLD)
    found = of_transformers(model, seed=1)
    assert (found.sampler, found.threshold, found.temperature) == ("threshold", 0.7, 0.5)
    assert (found.top_p, found.max_new_tokens) == (0.9, 9)
    assert of_transformers(model, do_sample=False).temperature == 0
    assert of_transformers(model, steps=2, sampler="confidence").threshold is None
    assert of_transformers(model, threshold=0.2).threshold == 0.2
    model.generation_config.blockdiff = {"temperature": 0}
    assert of_transformers(model, do_sample=True).temperature == 1
    # A configuration that was handed over is the caller's; what stands beside it comes before it.
    config = GenerationConfig(temperature=0.3)
    config.blockdiff = dict(THRESHOLD)
    assert of_transformers(model, config).temperature == 0.5
    assert of_transformers(model, config, temperature=0.9).temperature == 0.9
    assert of_transformers(model, config, margin=0.1).threshold is None


def test_the_command_line_takes_them_and_says_so(folder, capsys):
    def options(*words):
        cli.main(["generate", str(folder), "the", "--json", *words])
        return json.loads(capsys.readouterr().out)["options"]

    found = options()
    assert (found["sampler"], found["tokens_per_step"], found["block_size"]) == ("confidence", 2, 2)
    assert (found["max_new_tokens"], found["temperature"]) == (6, 0.5)
    found = options("--threshold", "0.4", "--temperature", "1", "--max-new-tokens", "2")
    assert (found["sampler"], found["tokens_per_step"], found["threshold"]) == (
        "threshold", None, 0.4
    )  # fmt: skip
    assert (found["max_new_tokens"], found["temperature"]) == (2, 1)


def test_chat_and_infill_take_them(folder, capsys, monkeypatch):
    opened = load_model(folder)
    assert filled(opened, ChatSampling(), set()).max_new_tokens == 6
    assert type(filled(opened, ChatSampling(), {"seed"})) is ChatSampling
    opened.generation_config.blockdiff = {}
    assert filled(opened, ChatSampling(), set()).max_new_tokens == 512
    given = ChatSampling(seed=2)
    assert filled(opened, given, None) is given

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the law\n")))
    cli.main(["chat", str(folder), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["tokens"] <= 6 and answer["tokens_per_nfe"] > 1
    nfe = {}
    for words in ([], ["--sampler", "first_hitting"]):
        cli.main(["infill", str(folder), "the [[gap:8]] law", "--json", *words])
        nfe[bool(words)] = json.loads(capsys.readouterr().out)["nfe"]
    assert nfe[False] < nfe[True]
