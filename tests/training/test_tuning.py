"""Training on conversations: what has a loss, and that the run is one like any other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import blockdiff
from blockdiff import cli
from blockdiff.data.tokenizers import load_tokenizer, train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.corpus import evaluate_corpus
from blockdiff.evaluation.options import EvaluateOptions
from blockdiff.models.loading import adapt_folder
from blockdiff.training.building import build_model
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.data import prepare_data
from blockdiff.training.run import train
from blockdiff.training.trainer import BlockDiffusionTrainer
from processes import pair

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def chats(count=24, longest=3):
    """Conversations of one to `longest` answers, of several lengths."""
    return [
        {"messages": [
            {"role": role, "content": f"{'say' if role == 'user' else 'word'} {i * j % 7}"}
            for j in range(1, 2 + i % longest) for role in ("user", "assistant")
        ]}
        for i in range(1, count + 1)
    ]  # fmt: skip


def write(path, rows):
    Path(path).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    write("chat.jsonl", chats())
    write("pairs.jsonl", [{"prompt": f"say {i % 7}", "response": f" word {i % 5}"}
                          for i in range(30)])  # fmt: skip
    Path("chat.jinja").write_text(TEMPLATE)
    return tmp_path


def small(out="out", **changes):
    return TrainConfig(**{
        "data": "chat.jsonl", "format": "chat", "chat_template": "chat.jinja", "out": out,
        "length": 64, "vocab_size": 262, "steps": 6, "batch_size": 2, "block_size": "2,4",
        "warmup": 1, "eval_windows": 2, "validation_fraction": 0.2, "report_to": "none",
        "log_every": 1, "save_every": 3, "ema": 0.9, "precision": "float32", **changes,
    })  # fmt: skip


def losses(folder):
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: x for k, x in m.items() if k.startswith(("loss", "grad"))} for m in lines
            if "loss" in m]  # fmt: skip


KINDS = {
    "bd3lm": {},
    "ar": {"objective": "ar", "block_size": 4},
    "mdlm": {"objective": "mdlm", "block_size": 4},
    "pairs": {"data": "pairs.jsonl", "format": "prompt", "chat_template": None},
}


# -- what has a loss ------------------------------------------------------------------------------


class Reading(nn.Module):
    """A network that reads the original text, whatever tokens the loss is told are the truth."""

    def __init__(self, model, x_0, mask):
        super().__init__()
        self.model, self.x_0, self.mask = model, x_0, mask

    def forward(self, x_t, x_0=None, **named):
        x_t = torch.where(x_t == self.mask, self.mask, self.x_0)
        return self.model(x_t, None if x_0 is None else self.x_0, **named)


@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_of_a_prompt_change_no_gradient(room, kind):
    config = small(dropout=0.0, ema=0.0, **KINDS[kind])
    data = prepare_data(config)
    model = build_model(config, data.tokenizer, None)
    trainer = BlockDiffusionTrainer(
        model, config, data.train, data.validation, torch.device("cpu"), []
    )
    batch = {name: torch.stack([data.train[i][name] for i in range(2)]) for name in data.train[0]}
    prompt = ~batch["maskable"]
    assert bool(prompt.any()) and bool(batch["maskable"].any())

    def gradient(labels):
        model.zero_grad()
        reading = Reading(model, batch["x_0"], data.tokenizer.mask_token_id)
        trainer._micro = (-1, 0)
        loss, found = trainer.compute_loss(
            reading, batch | {"x_0": labels}, return_outputs=True, num_items_in_batch=10
        )
        loss.backward()
        assert not bool(found["nats"][prompt].any())
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    own = gradient(batch["x_0"])
    assert any(bool(g.any()) for g in own)
    others = (batch["x_0"] + 1) % 200
    for a, b in zip(own, gradient(torch.where(prompt, others, batch["x_0"])), strict=True):
        assert torch.equal(a, b)
    changed = gradient(torch.where(prompt, batch["x_0"], others))
    assert not all(torch.equal(a, b) for a, b in zip(own, changed, strict=True))


def test_prompts_and_documents_are_seen_as_they_are_alone(room):
    """A conversation packed among others has the loss it has alone in a window."""
    config = small(block_size=4, dropout=0.0)
    data = prepare_data(config)
    model = build_model(config, data.tokenizer, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    windows = [data.train[i] for i in range(len(data.train))]
    window = max(windows, key=lambda w: w["documents"].max())
    last = int(window["documents"].max())
    assert last > 0
    mine = window["documents"] == last
    begin, end = (int(mine.nonzero()[i]) for i in (0, -1))
    alone = {name: x.roll(-begin)[None].clone() for name, x in window.items()}
    alone["documents"][:, end + 1 - begin :] = -1
    both = [
        blockdiff.likelihood(
            model, one["x_0"], documents=one["documents"], estimator="enumerate",
            maskable=one["maskable"] & (one["documents"] == last),
        )
        for one in (alone, {name: x[None] for name, x in window.items()})
    ]  # fmt: skip
    assert both[0].tokens.item() == int((window["maskable"] & mine).sum())
    assert both[0].nats.item() == pytest.approx(both[1].nats.item(), rel=1e-4)


# -- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bd3lm", "ar", "pairs"])
def test_a_run_on_conversations(room, kind, capsys):
    options = KINDS[kind]
    done = train(small(steps=8, lr=1e-2, dropout=0.0, **options), progress=False)
    said = capsys.readouterr().err
    record = json.loads((done.folder / "run.json").read_text())["run"]
    counts = record["conversations"]["train"]
    held = record["conversations"]["validation"]["conversations"]
    assert held > 0 and counts["conversations"] + held == (30 if kind == "pairs" else 24)
    assert f": {counts['responses']} responses in {counts['conversations']} conversations" in said
    assert f"{counts['cut']} of them cut at 64 tokens" in said
    found = losses(done.folder)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    tokenizer = load_tokenizer(done.folder)
    assert tokenizer.chat_template == (TEMPLATE if kind != "pairs" else None)
    # Measured again, on what the run held out, in the way it was trained.
    text = options.get("data", "chat.jsonl")
    again = evaluate_corpus(done.folder, EvaluateOptions(text, windows=2))
    assert again["part"] == "validation"
    assert again["nats_per_token"] == pytest.approx(done.metrics["eval_nats_per_token"], rel=1e-4)
    assert again["bits_per_byte"] > 0


def test_evaluate_reads_conversations_of_any_text(room, capsys):
    folder = train(small(block_size=4), progress=False).folder
    write("other.jsonl", chats(5))
    cli.main(["evaluate", str(folder), "other.jsonl", "--format", "chat", "--json"])
    other = json.loads(capsys.readouterr().out)
    assert other["part"] == "all" and other["counted_tokens"] > 0
    cli.main(["evaluate", str(folder), "other.jsonl", "--format=chat", "--block-size=8", "--json"])
    assert json.loads(capsys.readouterr().out)["block_size"] == 8
    cli.main(["variance", str(folder), "other.jsonl", "--format", "chat", "--batches", "2",
              "--batch-size", "1", "--draws", "2", "--estimators", "exact_k"])  # fmt: skip


def test_two_processes_take_the_steps_of_one(room):
    config = small("one", dropout=0.0, steps=3)
    train(config, progress=False)
    words = [f"--{name}={value}" for name, value in vars(replace(config, out="two")).items()
             if value is not None and value != getattr(TrainConfig(), name)]  # fmt: skip
    both = pair(room / "streams", ["train", *words])
    for done in both:
        assert done.returncode == 0, done.stderr[-3000:]
    assert sum(done.stderr.count("responses in") for done in both) == 1, "one of them tells it"
    ours, theirs = losses("two"), losses("one")
    assert len(theirs) == len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("again", [False, True])
def test_a_resumed_run_is_an_uninterrupted_one(room, again):
    whole = train(small("whole", checkpoint_activations=again), progress=False).folder
    cut = train(small("cut", steps=3), progress=False).folder
    Path("chat.jinja").unlink()  # the run's tokenizer has it
    train(TrainConfig(out="cut", resume=True, steps=6), progress=False, given={"steps"})
    ours, theirs = (load_file(f / "model.safetensors") for f in (cut, whole))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert len(losses(cut)) == len(losses(whole)) == 6


def test_a_run_is_not_resumed_on_other_conversations(room):
    train(small("cut", steps=3), progress=False)
    write("chat.jsonl", chats(23))
    with pytest.raises(InputError, match="is not what the run in"):
        train(TrainConfig(out="cut", resume=True, steps=6), progress=False, given={"steps"})


def test_mixtures_of_conversations(room):
    write("more.jsonl", chats(12))
    mixed = prepare_data(small(data=["chat.jsonl", "more.jsonl"], data_weights="2,1"))
    counts = mixed.conversations
    assert counts["train"]["conversations"] + counts["validation"]["conversations"] == 36
    own = prepare_data(small(validation_data="more.jsonl")).conversations
    assert own["train"]["conversations"] == 24 and own["validation"]["conversations"] == 12


@pytest.mark.parametrize("prediction", ["shift", "same"])
def test_an_adapted_model_is_tuned_by_the_same_run(room, prediction):
    words = train_tokenizer([json.dumps(chats())], 262)
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    ))  # fmt: skip
    base.save_pretrained("base")
    words.chat_template = TEMPLATE
    words.save_pretrained("base")
    adapt_folder("base", "adapted", block_size=4, prediction=prediction)
    config = small(
        init_from="adapted", chat_template=None, steps=12, lr=3e-3, checkpoint_activations=True
    )
    done = train(config, progress=False)
    found = losses(done.folder)
    assert found[-1]["loss"] < found[0]["loss"]
    model = blockdiff.load_model(done.folder)
    assert model.config.block_sizes == (2, 4) and model.config.block_size == 4
    assert load_tokenizer(done.folder).chat_template == TEMPLATE


# -- bad input ------------------------------------------------------------------------------------


REFUSED = {
    "no template": (["--chat-template="], "--chat-template is empty"),
    "template gone": (["--chat-template", "no.jinja"], "no.jinja: No such file"),
    "template broken": (["--chat-template", "broken.jinja"], "cannot write the conversation"),
    "role": (["--data", "bot.jsonl"], "bot.jsonl, line 2: message 1 has the role 'bot'"),
    "nothing fits": (["--length", "8"], "the prompts alone fill --length 8"),
    "one": (["--data", "one.jsonl"], "too small to split"),
    "text": (["--data", "notes.txt"], "plain text, which has no chat"),
    "streaming": (["--streaming"], "--streaming is for --format text; leave it out with chat"),
    "eos": (["--no-eos"], "--eos is for --format text"),
    "marks": (["--window-marks"], "--window-marks is for"),
    "padded": (["--no-across-documents"], "--across-documents is for"),
    "detokenizer": (["--detokenizer", "ptb"], "--detokenizer is for"),
    "template of pairs": (["--format", "prompt"], "--chat-template is for --format chat"),
    "format": (["--format", "talk"], "choose one of text, chat, prompt"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_input_is_one_line_before_any_work(room, kind, capsys):
    words, said = REFUSED[kind]
    write("bot.jsonl", [chats(1)[0], {"messages": [{"role": "bot", "content": "x"}]}])
    write("one.jsonl", chats(1))
    Path("notes.txt").write_text("Hello")
    Path("broken.jinja").write_text("{% if %}")
    own = [] if "--data" in words else ["--data", "chat.jsonl"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--format", "chat", "--out", "out", "--chat-template", "chat.jinja",
                  "--length", "64", "--batch-size", "2", *own, *words])  # fmt: skip
    line = capsys.readouterr().err
    assert stop.value.code == 2 and said in line and line.count("\n") == 1, line
    assert not Path("out").exists()


def test_a_tokenizer_without_a_template_is_refused_before_the_text_is_read(room):
    train_tokenizer(["a b c"], 262).save_pretrained("words")
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        train(small(tokenizer="words", chat_template=None, data="nowhere.jsonl"), progress=False)
    with pytest.raises(InputError, match="a tokenizer that is trained here has none"):
        train(small(chat_template=None, data="nowhere.jsonl"), progress=False)
    assert not Path("out").exists()
