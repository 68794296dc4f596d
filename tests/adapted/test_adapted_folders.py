"""Folders of causal language models: adapted, opened, refused, and used as the AR they are."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from families import UNSUITABLE, WORDS, folder_of, tiny, tokens, words_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockdiff
from blockdiff import cli
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.judge import load_judge
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.hub import save_model
from blockdiff.models.loading import adapt_folder
from helpers import tiny_model

NEW, KNOWN = "<|mask|>", "<|reserved|>"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


def plain(folder, tokenizer=None, vocab_size=None, model_type="llama", **own):
    """A folder of a tiny model whose vocabulary is the tokenizer's, unless it is said."""
    tokenizer = tokenizer or words_tokenizer()
    sizes = {"vocab_size": vocab_size or len(tokenizer), **own}
    return folder_of(tiny(model_type, **sizes), folder, tokenizer)


def weights(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def refused(capsys, *words):
    """Runs a command that must be refused; its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("blockdiff: error: "), printed.err
    return lines[0]


# the mask token


@pytest.mark.parametrize("tied", [True, False])
def test_a_mask_token_is_added(tmp_path, tied, capsys):
    """With a row at the mean of the table, at the length of its rows; a tied head follows."""
    source = plain(tmp_path / "lm", tie_word_embeddings=tied)
    before, x_0 = weights(source), tokens(2, 12) % 15
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(source)(input_ids=x_0).logits
    cli.main(["adapt", str(source), str(tmp_path / "out"), "--block-size", "4"])
    assert "mask token id 15" in capsys.readouterr().out
    out = tmp_path / "out"
    after = weights(out)
    tables = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert before.keys() == after.keys()
    for name, old in before.items():
        if name not in tables:
            assert torch.equal(after[name], old)
            continue
        assert torch.equal(after[name][:-1], old) and len(after[name]) == 16
        row, mean = after[name][-1], old.mean(0)
        torch.testing.assert_close(row.norm(), old.norm(dim=1).mean())
        torch.testing.assert_close(F.cosine_similarity(row, mean, 0), torch.tensor(1.0))
    config = json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert config["vocab_size"] == len(tokenizer) == 16
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (NEW, 15)
    assert tokenizer.encode(f"w0{NEW}w1") == [3, 15, 4]
    model, loaded = blockdiff.load(out)
    assert model.config.mask_token_id == loaded.mask_token_id == 15
    assert model.config.kind == "bd3lm" and model.config.length == 48
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(out)(input_ids=x_0).logits[..., :15]
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-5)
    found = blockdiff.generate(model, "w0 w1", tokenizer=loaded, max_new_tokens=9, samples=4)
    assert all(15 not in ids for ids in found.tokens)


@pytest.mark.parametrize(
    "roles, given, mask",
    [
        ({"mask_token": NEW}, None, NEW),
        ({"additional_special_tokens": [KNOWN]}, KNOWN, KNOWN),
        ({"mask_token": NEW, "additional_special_tokens": [KNOWN]}, KNOWN, KNOWN),
    ],
)
def test_a_mask_token_that_is_known_changes_no_weight(tmp_path, roles, given, mask):
    """The tokenizer's own, or a special token without another meaning."""
    tokenizer = words_tokenizer(NEW, KNOWN, **roles)
    source = plain(tmp_path / "lm", tokenizer)
    adapt_folder(source, tmp_path / "out", mask_token=given)
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model, loaded = blockdiff.load(tmp_path / "out")
    assert loaded.mask_token == mask
    assert model.config.mask_token_id == tokenizer.convert_tokens_to_ids(mask)


def test_a_mask_token_that_is_given_is_added(tmp_path):
    adapt_folder(plain(tmp_path / "lm"), tmp_path / "out", mask_token="<blank>")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<blank>"


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_lends_a_row(tmp_path, tied):
    """It stays as large as it was; what no token has is never drawn."""
    source = plain(tmp_path / "lm", vocab_size=20, tie_word_embeddings=tied)
    adapt_folder(source, tmp_path / "out", block_size=4)
    before, after = weights(source), weights(tmp_path / "out")
    for name in before:
        changed = (after[name] != before[name]).flatten(1).any(1) if "embed" in name else []
        assert torch.as_tensor(changed).nonzero().flatten().tolist() in ([], [15])
    assert not torch.equal(
        after["model.embed_tokens.weight"][15], before["model.embed_tokens.weight"][15]
    )
    model, tokenizer = blockdiff.load(tmp_path / "out")
    assert (model.config.vocab_size, model.config.mask_token_id, len(tokenizer)) == (20, 15, 16)
    found = blockdiff.generate(model, "w0", tokenizer=tokenizer, max_new_tokens=20, samples=8)
    assert max(max(ids) for ids in found.tokens) < 15


@pytest.mark.parametrize(
    "word, reason",
    [
        ("w3", "'w3' is an ordinary token"),
        ("</s>", "'</s>' is this tokenizer's eos_token"),
        ("<s>", "'<s>' is this tokenizer's bos_token"),
        ("<unk>", "'<unk>' is this tokenizer's unk_token"),
    ],
)
def test_a_mask_token_that_text_may_hold_is_refused(tmp_path, word, reason, capsys):
    source = plain(tmp_path / "lm")
    line = refused(capsys, "adapt", source, tmp_path / "out", "--mask-token", word)
    assert reason in line and not (tmp_path / "out").exists()


# folders as people have them


def test_shards_and_number_formats(tmp_path):
    lm = tiny("llama", vocab_size=15).to(torch.bfloat16)
    source = folder_of(lm, tmp_path / "lm", words_tokenizer(), max_shard_size="8KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    adapt_folder(source, tmp_path / "bf16")
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.bfloat16}
    adapt_folder(source, tmp_path / "float32", dtype="float32")
    assert {tensor.dtype for tensor in weights(tmp_path / "float32").values()} == {torch.float32}
    adapt_folder(tmp_path / "lm", tmp_path / "narrow", dtype="bf16")
    opened = {}
    for name in ("bf16", "float32", "narrow"):
        model, tokenizer = blockdiff.load(tmp_path / name)
        assert model.dtype == torch.float32
        opened[name] = model
        for own, other in zip(model.parameters(), opened["bf16"].parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-3)
    half = blockdiff.load_model(tmp_path / "bf16", dtype=torch.bfloat16)
    found = blockdiff.generate(half, "w0 w1", tokenizer=tokenizer, max_new_tokens=8)
    assert found.tokens


def test_what_the_folder_says_comes_back(tmp_path):
    source = plain(tmp_path / "lm")
    model = adapt_folder(
        source, tmp_path / "out", block_size=(2, 6), prediction="same", clean="block"
    )
    again = blockdiff.load_model(tmp_path / "out")
    assert again.config.record() == model.config.record()
    assert (again.config.block_size, again.config.block_sizes) == (6, (2, 6))
    layout = again.config.layout
    assert (layout.clean, layout.prediction, layout.length) == ("block", "same", 48)
    assert (again.config.bos_token_id, again.config.eos_token_id) == (0, 1)


def spoilt(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["block_diffusion"] |= fields
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"block_size": "a"}, "--block-size is 'a'"),
        ({"block_size": 0}, "--block-size is 0"),
        ({"block_sizes": "many"}, "block_diffusion"),
        ({"mask_token_id": 99}, "mask token id 99 is outside the vocabulary"),
        ({"prediction": "next"}, "prediction 'next' is unknown"),
        ({"prompt_grid": "prompt_end"}, "absolute grid"),
        ({"inside_block": "both"}, "inside_block 'both' is unknown"),
        ({"colour": 1}, "nobody knows 'colour'"),
    ],
)
def test_a_record_that_is_no_record(tmp_path, fields, reason, capsys):
    adapt_folder(plain(tmp_path / "lm"), tmp_path / "out", block_size=4)
    spoilt(tmp_path / "out", **fields)
    line = refused(capsys, "generate", tmp_path / "out", "w0")
    assert "out/config.json: block_diffusion" in line and reason in line


def test_adapted_again_in_its_place(tmp_path, capsys):
    source, out = plain(tmp_path / "lm"), tmp_path / "out"
    cli.main(["adapt", str(source), str(out)])
    assert "already holds a model" in refused(capsys, "adapt", source, out)
    cli.main(["adapt", str(source), str(out), "--block-size", "2", "--overwrite"])
    assert blockdiff.load_model(out).config.block_size == 2
    assert "is a block diffusion model already" in refused(capsys, "adapt", out, tmp_path / "two")


@pytest.mark.parametrize("family", [f for f in UNSUITABLE if f not in ("falcon_h1", "phimoe")])
def test_unsuitable_folders_are_refused(tmp_path, family, capsys):
    model_type, own, drop, reason = UNSUITABLE[family]
    source = folder_of(tiny(model_type, drop, **own), tmp_path / "lm", words_tokenizer())
    line = refused(capsys, "adapt", source, tmp_path / "out")
    assert reason in line and not (tmp_path / "out").exists()


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def without_a_weight(folder):
    found = load_file(folder / "model.safetensors")
    del found["model.layers.1.mlp.up_proj.weight"]
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def with_a_hole(folder):
    found = load_file(folder / "model.safetensors")
    found["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def with_pickles(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_a_shard(folder):
    shutil.rmtree(folder)
    folder_of(tiny("llama", vocab_size=15), folder, words_tokenizer(), max_shard_size="8KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def with_another_tokenizer(folder):
    words_tokenizer("more", "and", "more still").save_pretrained(folder)


def of_another_shape(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 40'))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (without_tokenizer, "tokenizer"),
        (without_a_weight, "model.layers.1.mlp.up_proj.weight is missing"),
        (with_a_hole, "model.layers.1.mlp.up_proj.weight holds numbers that are not finite"),
        (with_pickles, "pickled weights only"),
        (without_a_shard, "which is not in"),
        (with_another_tokenizer, "it is not the model's tokenizer"),
        (of_another_shape, "model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_spoilt_folders_are_refused(tmp_path, spoil, reason, capsys):
    source = plain(tmp_path / "lm")
    spoil(source)
    line = refused(capsys, "adapt", source, tmp_path / "out")
    assert reason in line and not (tmp_path / "out").exists()


def test_what_is_no_causal_model_is_refused(tmp_path, capsys):
    tokenizer = train_tokenizer(["w0 w1"], 300)
    save_model(tiny_model(vocab_size=len(tokenizer)), tmp_path / "dit", tokenizer)
    refused_line = refused(capsys, "adapt", tmp_path / "dit", tmp_path / "out")
    assert "no causal language model" in refused_line
    assert "no folder" in refused(capsys, "adapt", tmp_path / "none", tmp_path / "out")
    source = plain(tmp_path / "lm")
    for words in (["--block-size", "0"], ["--block-size", "64"], ["--prediction", "next"]):
        refused(capsys, "adapt", source, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


# the AR face


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    source = tmp_path_factory.mktemp("plain") / "lm"
    return plain(source, model_type="gemma2", sliding_window=5, final_logit_softcapping=3.0)


def own_nats(folder, x_0):
    """[B, L − 1]: transformers' own cross entropy of each token but the first."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=x_0).logits[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), x_0[:, 1:].flatten(), reduction="none")
    return nats.view(len(x_0), -1)


def test_a_plain_model_is_measured_as_it_is(folder, tmp_path, capsys):
    model, _ = blockdiff.load(folder)
    assert model.config.kind == "ar"
    x_0 = tokens(3, 40) % 15
    found = likelihood(model, x_0)
    # Sums of 39 tokens; attention adds in another order.
    torch.testing.assert_close(found.nats.float(), own_nats(folder, x_0).sum(1), rtol=1e-5, atol=0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 20))
    cli.main(["evaluate", str(folder), str(text), "--length", "24", "--json"])
    assert json.loads(capsys.readouterr().out)["estimator"] == "ar"


def test_a_plain_model_writes_as_it_is(folder):
    """Greedily, token for token as transformers' `generate`, far past its sliding window."""
    model, tokenizer = blockdiff.load(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in ([0, 3], [0, 4, 5, 6, 7, 8, 9, 10, 3]):
        expected = lm.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)
        found = blockdiff.generate(
            model, [prompt], tokenizer=tokenizer, max_new_tokens=30, temperature=0
        )
        assert found.tokens[0] == expected[0, len(prompt) :].tolist()


def test_a_plain_model_scores_as_it_is(folder):
    model, tokenizer = blockdiff.load(folder)
    found = blockdiff.score(model, "w0 w1", "w2 w5 w3", tokenizer=tokenizer)
    x_0 = torch.tensor([[0, *tokenizer.encode("w0 w1 w2 w5 w3")]])
    assert found.tokens == 3
    assert found.nats == pytest.approx(own_nats(folder, x_0)[0, -3:].sum().item(), abs=1e-4)


def test_a_plain_model_judges(folder, tmp_path):
    """So does an adapted one that predicts the next token still, and none that does not."""
    text = " ".join(WORDS * 2)
    x_0 = torch.tensor([[0, *words_tokenizer().encode(text)]])
    adapt_folder(folder, tmp_path / "shift", block_size=4)
    adapt_folder(folder, tmp_path / "same", block_size=4, prediction="same")
    for source in (folder, tmp_path / "shift"):
        expected = own_nats(source, x_0).sum().item()
        assert load_judge(str(source)).nats([text])[0].item() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(InputError, match="a judge is autoregressive"):
        load_judge(str(tmp_path / "same"))


def test_a_plain_model_is_not_trained_as_it_is(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 200))
    line = refused(
        capsys, "train", text, "--out", tmp_path / "run", "--init-from", folder,
        "--tokenizer", folder, "--length", "24", "--block-size", "4", "--steps", "1",
    )  # fmt: skip
    assert "make it a block diffusion model first: blockdiff adapt" in line


def test_no_code_of_a_folder_runs(folder, tmp_path):
    """Named in its config.json, it is ignored: the class is transformers' own."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Gemma2ForCausalLM"}
    (copy / "config.json").write_text(json.dumps(config))
    assert type(blockdiff.load_model(copy).lm).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()
    with safe_open(copy / "model.safetensors", "pt") as file:
        assert file.keys()
