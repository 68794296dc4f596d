"""What transformers' users do with a model, done with ours."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer, TextDiffusionStreamer

import blockdiff
from blockdiff import load_model, save_model
from blockdiff.errors import InputError
from blockdiff.estimators import ESTIMATORS, Estimator
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.laws import objective_of
from blockdiff.layout import BlockLayout
from blockdiff.models import card
from blockdiff.models.adapted import Adapted
from blockdiff.models.dit import DiT
from blockdiff.noising import stratified_noise
from helpers import random_tokens, tiny_model

KINDS = {
    "bd3lm": {"block_size": 4},
    "ar": {"causal": True},
    "mdlm": {"block_size": 12},
    "sedd": {"block_size": 12, "score": True, "time_conditioning": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def network(kind: str = "bd3lm", **settings: object) -> DiT:
    return tiny_model(vocab_size=9, **{**KINDS[kind], **settings})


@pytest.fixture
def model() -> DiT:
    return network()


@pytest.fixture(scope="module")
def starter():
    return blockdiff.load("starter", device="cpu")


@pytest.fixture(scope="module")
def folder(starter, tmp_path_factory) -> Path:
    """A small model with the starter's tokenizer, as `save_model` leaves it."""
    _, tokenizer = starter
    model = tiny_model(vocab_size=2048, bos_token_id=0, eos_token_id=0)
    path = tmp_path_factory.mktemp("hub") / "model"
    save_model(model, path, tokenizer)
    return path


# the loss


@EVERY_KIND
def test_the_loss_is_the_objectives_over_masks_of_the_global_generator(kind):
    model = network(kind)
    x_0 = random_tokens(model, 3, 12)
    torch.manual_seed(5)
    loss = model(x_0, labels=x_0).loss
    config, layout = model.config, BlockLayout(12, model.config.block_size)
    objective = objective_of(config)
    what = counted = objective.counted(x_0, config.keep_first)
    if objective.noised:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        noise = stratified_noise(3, layout, generator)
        what = ESTIMATORS["exact_k"].draw(x_0, layout, noise, counted, config.mask_token_id)
    expected = objective.nats(model, x_0, what, layout).sum() / counted.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.requires_grad
    set_seed(5)
    again = model(x_0, labels=x_0).loss
    assert torch.equal(again, loss) and (kind == "ar" or model(x_0, labels=x_0).loss != loss)


@EVERY_KIND
def test_its_mean_is_the_likelihood(kind):
    """Over all masks at once: `enumerate` draws nothing."""
    model = network(kind, **({"block_size": 4} if kind == "bd3lm" else {}))
    x_0 = random_tokens(model, 2, 12)
    if kind == "bd3lm":
        model.estimator = "enumerate"
    with torch.no_grad():
        losses = torch.stack(
            [model(x_0, labels=x_0).loss for _ in range(1 if kind in ("ar", "bd3lm") else 300)]
        )
    found = likelihood(model, x_0, "auto" if kind in ("ar", "bd3lm") else "exact_k", draws=300)
    spread = 0 if len(losses) == 1 else losses.std().item() / len(losses) ** 0.5
    error = 4 * (spread**2 + found.mask_stderr**2) ** 0.5 + 1e-5
    assert abs(losses.mean().item() - found.nats_per_token) < error


@EVERY_KIND
def test_padding_counts_nowhere_and_nothing_attends_to_it(kind):
    """Whatever it is: so texts of any length have the loss of the same texts alone."""
    model = network(kind)
    x_0 = random_tokens(model, 2, 10)
    mask = torch.ones_like(x_0)
    mask[1, 7:] = 0
    labels = x_0.masked_fill(mask == 0, -100)
    found = []
    for other in (0, 3):
        torch.manual_seed(1)
        found.append(
            model(x_0.masked_fill(mask == 0, other), labels=labels, attention_mask=mask).loss
        )
    assert torch.equal(*found)
    torch.manual_seed(1)
    unmasked = model(x_0, labels=x_0, attention_mask=mask).loss
    assert torch.equal(found[0], unmasked), "a label at padding counts as little"


def test_padding_is_the_text_without_it():
    model = network("ar")
    x_0 = random_tokens(model, 1, 10)
    padded = torch.cat([x_0, torch.zeros(1, 2, dtype=torch.int64)], 1)
    mask = torch.tensor([[1] * 10 + [0] * 2])
    labels = padded.masked_fill(mask == 0, -100)
    alone, with_it = (model(x_0, labels=x_0).loss,
                      model(padded, labels=labels, attention_mask=mask).loss)  # fmt: skip
    assert alone.item() == pytest.approx(with_it.item(), rel=1e-6)
    left = torch.cat([torch.zeros(1, 2, dtype=torch.int64), x_0], 1)
    there = mask.flip(1)
    logits = model(left, attention_mask=there).logits[:, 2:]
    assert torch.allclose(logits, model(x_0).logits, atol=1e-4), "positions are relative"


def test_prompts_are_given(model):
    """A label of −100 keeps its token clean: only the others have a loss."""
    x_0 = random_tokens(model, 2, 12)
    labels = x_0.clone()
    labels[:, :6] = -100
    model.estimator = "enumerate"
    counted = labels != -100
    found = likelihood(model, x_0, "enumerate", maskable=counted)
    assert model(x_0, labels=labels).loss.item() == pytest.approx(found.nats_per_token, rel=1e-5)
    assert model(x_0, labels=torch.full_like(x_0, -100)).loss.item() == 0
    divided = model(x_0, labels=labels, num_items_in_batch=24).loss
    assert divided.item() == pytest.approx(found.nats_per_token / 2, rel=1e-5)


def test_documents_by_their_positions(model):
    """A padding-free collator tells documents by positions that begin again."""
    x_0, model.estimator = random_tokens(model, 1, 12), "enumerate"
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(x_0, labels=x_0, position_ids=positions).loss
    documents = torch.tensor([[0] * 5 + [1] * 7])
    found = likelihood(model, x_0, "enumerate", documents=documents)
    assert packed.item() == pytest.approx(found.nats_per_token, rel=1e-5)
    plain = model(x_0, labels=x_0, position_ids=torch.arange(12)[None]).loss
    assert torch.equal(plain, model(x_0, labels=x_0).loss) and packed != plain


def test_a_clip_is_trained_with_and_never_measured_with(model):
    x_0, seen = random_tokens(model, 2, 12), []
    model.config.clip = [0.3, 0.8]
    for training in (True, False):
        model.train(training)
        torch.manual_seed(0)
        seen.append(model(x_0, labels=x_0).loss.item())
    model.config.clip = None
    torch.manual_seed(0)
    assert seen[0] != seen[1] == model(x_0, labels=x_0).loss.item()
    every = Estimator("every", lambda x_0, layout, noise, maskable, mask: ESTIMATORS[
        "clipped"].draw(x_0, layout, noise, maskable, mask, beta=1, omega=1))  # fmt: skip
    model.estimator = every
    assert torch.equal(model(x_0, labels=x_0).loss, model(x_0, labels=x_0).loss)


def test_several_block_sizes_are_trained_in_turn_and_measured_in_the_largest():
    model = network(block_sizes=(1, 2, 4))
    x_0, model.estimator = random_tokens(model, 2, 12), "enumerate"
    sizes = {likelihood(model, x_0, "enumerate", block_size=size).nats_per_token: size
             for size in (1, 2, 4)}  # fmt: skip

    def size() -> int:
        loss = model(x_0, labels=x_0).loss.item()
        return next(size for nats, size in sizes.items() if nats == pytest.approx(loss, rel=1e-5))

    assert {size() for _ in range(5)} == {4}
    model.train()
    assert {size() for _ in range(30)} == {1, 2, 4}


def test_what_is_no_label_is_one_line(model):
    x_0 = random_tokens(model, 2, 12)
    for labels, words in (
        (x_0.roll(-1, 1), "labels differ from input_ids"),
        (x_0[:, 1:], r"`labels` is \[2, 11\]"),
    ):
        with pytest.raises(InputError, match=words):
            model(x_0, labels=labels)
    masked = x_0.clone()
    masked[0, 3] = model.config.mask_token_id
    with pytest.raises(InputError, match="hold the mask token"):
        model(masked, labels=masked)
    with pytest.raises(InputError, match="labels differ"):  # mlm=True
        model(masked, labels=x_0)
    with pytest.raises(InputError, match="leave x_0 out"):
        model(x_0, x_0, labels=x_0)
    with pytest.raises(InputError, match=r"`attention_mask` is \[2, 3\]"):
        model(x_0, attention_mask=torch.ones(2, 3))
    with pytest.raises(InputError, match="does not read `output_attentions`"):
        model(x_0, output_attentions=True)
    output = model(x_0, use_cache=True, inputs_embeds=None, output_attentions=False)
    assert output.logits.shape == (2, 12, 9) and output.loss is None


# Trainer


def trained(model: DiT, out: Path, **settings: object) -> Trainer:
    """Eight steps on one text of twelve words, in rows of unlike lengths."""
    text = [1, 2, 3, 4, 5, 6, 7, 1, 3, 5, 7, 2]
    rows = Dataset.from_list([{"input_ids": text[: 12 - i % 3]} for i in range(16)])
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=4, learning_rate=3e-2, report_to="none", max_steps=8,
        logging_steps=4, lr_scheduler_type="constant", use_cpu=True, save_strategy="no",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=padded)
    trainer.train()
    return trainer


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    input_ids, there = torch.tensor(ids), torch.tensor(mask)
    labels = input_ids.masked_fill(there == 0, -100)
    return {"input_ids": input_ids, "attention_mask": there, "labels": labels}


@pytest.mark.parametrize("kind", ["bd3lm", "ar"])
def test_a_plain_trainer_lowers_the_loss(kind, tmp_path):
    model = network(kind)
    trainer = trained(model, tmp_path, gradient_accumulation_steps=2)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < trainer.evaluate()["eval_loss"] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    opened = load_model(tmp_path / "saved")
    assert all(
        torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True)
    )


def test_trainer_counts_the_tokens_the_loss_counts(tmp_path):
    """Then a step in two micro-batches of unlike sizes is the step at once."""
    steps = []
    for accumulate in (1, 2):
        model = network("ar")
        rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4, 5, 6]}, {"input_ids": [7, 1, 2]}])
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2 // accumulate, report_to="none",
            gradient_accumulation_steps=accumulate, max_steps=1, optim="sgd", learning_rate=0.1,
            use_cpu=True, save_strategy="no", logging_steps=1, max_grad_norm=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=padded)
        trainer.train()
        steps.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*steps, strict=True))


def test_a_language_modelling_collator_gives_labels(starter, folder):
    """transformers' own: labels are the ids, −100 at padding."""
    _, tokenizer = starter
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([dict(tokenizer(text)) for text in ("The people of the", "I")])
    assert load_model(folder)(**batch).loss > 0


def test_recomputed_activations_have_the_same_gradients(model):
    x_0 = random_tokens(model, 2, 12)
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train().zero_grad()
        torch.manual_seed(2)
        model(x_0, labels=x_0).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_peft_trains_it(model):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    x_0 = random_tokens(model, 2, 12)
    before = model(x_0).logits
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv"], task_type="CAUSAL_LM"))
    assert torch.allclose(tuned(x_0).logits, before)
    tuned(input_ids=x_0, labels=x_0, attention_mask=torch.ones_like(x_0)).loss.backward()
    grads = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert grads and all(grad is not None for grad in grads)
    ids = tuned.generate(input_ids=x_0[:, :4], max_new_tokens=3, seed=0)
    assert ids.shape == (2, 7)


# generate


def test_the_tokens_are_those_of_blockdiff(starter):
    model, tokenizer = starter
    prompts = tokenizer(["The people of the", "I"], padding=True, padding_side="left",
                        return_tensors="pt")  # fmt: skip
    rows = [tokenizer(text)["input_ids"] for text in ("The people of the", "I")]
    wish = {"max_new_tokens": 9, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 3}
    ids = model.generate(**prompts, **wish)
    expected = blockdiff.generate(model, rows, tokenizer=tokenizer, **wish)
    width = prompts["input_ids"].shape[1]
    assert torch.equal(ids[:, :width], prompts["input_ids"])
    assert ids[:, width:].tolist() == expected.tokens
    # a text ends with the token that completes one of these
    stopped = model.generate(**prompts, **wish, stop_strings=[" of"], tokenizer=tokenizer)
    for row, tokens in zip(stopped[:, width:].tolist(), expected.tokens, strict=True):
        texts = [tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]
        end = next((i for i, text in enumerate(texts, 1) if " of" in text), len(tokens))
        assert row[:end] == tokens[:end] and set(row[end:]) <= {0}
    # and under every option of the package's own
    own = {"sampler": "ancestral", "steps": 2, "block_size": 2, "stop": "none", "max_new_tokens": 5}
    with pytest.warns(UserWarning, match="trained with block size 1, 4, 8, 16, not 2"):
        found = model.generate(prompts["input_ids"][:1], seed=1, **own)
        expected = blockdiff.generate(model, rows[:1], tokenizer=tokenizer, seed=1, **own)
    assert found[0, width:].tolist() == expected.tokens[0]


def test_orders_in_transformers_words(model):
    prompt, wish = torch.tensor([[1, 2, 3]]), {"max_new_tokens": 8, "stop": "none", "seed": 3}
    for given in ({"threshold": 0.2}, {"alg": "entropy"}, {"denoising_steps": 2}, {"steps": 2}):
        found = model.generate(prompt, **given, **wish)[0, 3:].tolist()
        assert found == blockdiff.generate(model, [[1, 2, 3]], options=given, **wish).tokens[0]
    plain = model.generate(prompt, **wish)
    # A folder's settings are read where it names their order, and the caller chooses none.
    model.generation_config.steps = 1
    try:
        assert torch.equal(model.generate(prompt, **wish), plain)
        model.generation_config.sampler = "confidence"
        whole = model.generate(prompt, sampler="confidence", steps=1, **wish)
        assert not torch.equal(whole, plain)
        assert torch.equal(model.generate(prompt, **wish), whole)
        assert torch.equal(model.generate(prompt, sampler="first_hitting", **wish), plain)
        sure = model.generate(prompt, threshold=0.2, **wish)
        assert torch.equal(sure, model.generate(prompt, sampler="threshold", threshold=0.2, **wish))
    finally:
        del model.generation_config.steps, model.generation_config.sampler


def greedy(model: DiT, prompt: list[int], count: int, row: int = 0) -> list[int]:
    wish = {"temperature": 0, "max_new_tokens": count, "stop": "none"}
    return blockdiff.generate(model, [prompt], rows=[row], **wish).tokens[0]


def test_settings_in_transformers_words(model):
    prompt = torch.tensor([[1, 2, 3]])
    best = greedy(model, [1, 2, 3], 6)
    assert model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 3:].tolist() == best
    assert model.generate(prompt, max_length=9, do_sample=False)[0, 3:].tolist() == best
    wish = GenerationConfig(max_new_tokens=6, do_sample=False, use_cache=True, num_beams=1)
    assert model.generate(prompt, wish)[0, 3:].tolist() == best
    assert model.generate(prompt, wish, max_new_tokens=2)[0, 3:].tolist() == best[:2]
    assert model.generate(prompt, temperature=0, top_k=0, max_new_tokens=6)[0, 3:].tolist() == best
    # An end is any of several, and rows are padded behind theirs.
    ends = [best[2], 8]
    first = best.index(best[2]) + 1
    ids = model.generate(prompt, wish, eos_token_id=ends, pad_token_id=0)
    assert ids[0, 3:].tolist() == best[:first]
    other = torch.tensor([[1, 2, 3], [5, 5, 5]])
    both = model.generate(other, wish, eos_token_id=ends, pad_token_id=0)
    assert both[0, 3 : 3 + first].tolist() == best[:first] and not both[0, 3 + first :].any()
    # Copies of a prompt stand side by side and differ; the global seed rules them.
    set_seed(1)
    many = model.generate(other, max_new_tokens=8, num_return_sequences=3)
    assert many[:, 0].tolist() == [1] * 3 + [5] * 3 and len(set(map(tuple, many.tolist()))) > 2
    set_seed(1)
    again = model.generate(
        other, max_new_tokens=8, num_return_sequences=3, return_dict_in_generate=True
    )
    assert torch.equal(again.sequences, many)
    assert model.training is False and model.train().generate(prompt, wish).shape == (1, 9)
    assert model.training


def test_without_a_prompt_a_text_begins_at_its_beginning():
    model = network(bos_token_id=1)
    assert model.generate(max_new_tokens=3)[0, 0] == 1
    with pytest.raises(InputError, match="no token to begin"):
        network().generate(max_new_tokens=3)


def test_padding_on_the_left_is_cut_off(model):
    ids = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    wish = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, **wish)
    assert found[0, 4:].tolist() == greedy(model, [1, 2], 4)
    assert found[1, 4:].tolist() == greedy(model, [3, 4, 5, 6], 4, 1)
    assert torch.equal(model.generate(ids, pad_token_id=0, **wish), found), "the pads tell it"
    # not where the padding is the beginning of a text as well
    begun = network(bos_token_id=0)
    assert begun.generate(ids[:1], pad_token_id=0, **wish)[0, 4:].tolist() == greedy(
        begun, [0, 0, 1, 2], 4
    )
    for wrong in (mask.flip(1), mask[:, :2], torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]])):
        with pytest.raises(InputError, match="attention_mask"):
            model.generate(ids, attention_mask=wrong, **wish)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"max_new_tokens": 4, "max_length": 9}, "`max_new_tokens` and `max_length` were both"),
        ({"max_length": 3}, "`max_length` 3 counts the prompt"),
        ({"num_beams": 2}, "no `num_beams` 2"),
        ({"encoder_repetition_penalty": 1.2}, "no `encoder_repetition_penalty` 1.2"),
        ({"stopping_criteria": [print]}, "no `stopping_criteria`; leave it out"),
        ({"max_tokens": 4}, "no option `max_tokens`; it reads bad_words_ids, "),
        ({"temperature": -1}, "`temperature` is -1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"num_return_sequences": 0}, "`num_return_sequences` is 0"),
        ({"stop_strings": "."}, "`stop_strings` needs the model's tokenizer"),
        ({"sampler": "best"}, "`sampler` 'best' is unknown"),
        ({"generation_config": {"top_k": 3}}, "`generation_config` is dict"),
        ({"inputs": torch.tensor([[1]])}, "are the same"),
        ({"input_ids": [[1]]}, "`input_ids` is list"),
        ({"input_ids": torch.tensor([[1, 8]])}, "contains the mask token"),
        (
            {"input_ids": torch.ones(2, 3, dtype=torch.int64), "streamer": BaseStreamer()},
            "streamer",
        ),
    ],
)
def test_what_generate_cannot_do_is_one_line(model, wish, words, monkeypatch):
    monkeypatch.setattr(BaseStreamer, "end", lambda self: None)
    with pytest.raises(InputError, match=words) as error:
        model.generate(**{"input_ids": torch.tensor([[1, 2, 3]]), **wish})
    assert "\n" not in str(error.value)


class Noted(BaseStreamer):
    def __init__(self) -> None:
        self.puts, self.drafts, self.ends = [], [], 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.flatten().tolist())

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append((sum(map(len, self.puts)), value.flatten().tolist()))

    def end(self) -> None:
        self.ends += 1


@EVERY_KIND
@pytest.mark.parametrize("eos", [None, 5])
def test_a_streamer_sees_each_token_once_in_the_order_of_the_text(kind, eos):
    model, noted = network(kind), Noted()
    prompt = torch.tensor([[1, 2, 3]])
    count = 9 if kind == "sedd" else 14
    wish = {"max_new_tokens": count, "seed": 4, "eos_token_id": eos}
    ids = model.generate(prompt, streamer=noted, **wish)
    assert noted.puts[0] == [1, 2, 3]
    assert [token for put in noted.puts for token in put] == ids[0].tolist()
    assert all(noted.puts) and noted.ends == 1
    mask = model.config.mask_token_id
    for known, draft in noted.drafts:
        # What is behind the tokens put: it begins with a mask, and is as long as the text may be.
        assert draft[0] == mask and known + len(draft) == 3 + count
    plain = model.generate(prompt, **wish)
    assert torch.equal(plain, ids)


def test_transformers_own_streamers(starter, capsys):
    model, tokenizer = starter
    prompt = tokenizer("The people of", return_tensors="pt")
    wish = {**prompt, "max_new_tokens": 12, "seed": 1}
    text = tokenizer.decode(model.generate(**wish)[0])
    model.generate(**wish, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**wish, "streamer": streamer})
    thread.start()
    assert "The people of" + "".join(streamer) == text
    thread.join()
    model.generate(**wish, streamer=TextDiffusionStreamer(tokenizer))
    shown = capsys.readouterr().out
    assert "<|mask|>" in shown and shown.rstrip("\n").endswith(text.split()[-1])


def test_a_streamer_is_ended_where_generate_fails(model):
    """Its reader in another thread would wait for ever."""
    noted = Noted()
    with pytest.raises(InputError):
        model.generate(torch.tensor([[1, 2]]), num_beams=3, streamer=noted)
    assert noted.ends == 1 and not noted.puts


def test_generation_config_json_is_read_and_written(model, tmp_path, recwarn):
    model.generation_config.update(max_new_tokens=3, do_sample=False)
    model.generation_config.encoder_repetition_penalty = 1.1
    save_model(model, tmp_path)
    for opened in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        with pytest.warns(UserWarning, match=r"encoder_repetition_penalty 1\.1 is not read"):
            ids = opened.generate(torch.tensor([[1, 2, 3]]))
        assert ids[0, 3:].tolist() == greedy(model, [1, 2, 3], 3)
    wrong = '{"watermarking_config": {"greenlist_ratio": 7, "x": 1}}'
    for text, words in (("[]", "JSON object"), ("{", "not valid JSON"), (wrong, "describe")):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match=words):
            load_model(tmp_path)


# the Auto classes and the pipeline


def test_auto_classes_open_a_folder_as_ours(folder):
    assert type(AutoConfig.from_pretrained(folder)) is blockdiff.DiTConfig
    expected = load_model(folder)
    x = torch.tensor([[5, 6, 7, 8]])
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        model = auto.from_pretrained(folder)
        assert type(model) is DiT and not model.training
        assert torch.equal(model(x).logits, expected(x).logits)


def test_the_pipeline_writes_text(folder):
    write = pipeline("text-generation", model=str(folder), device="cpu")
    one = write("The people", max_new_tokens=4)
    assert one[0]["generated_text"].startswith("The people")
    two = write(["The people of", "I"], max_new_tokens=4, batch_size=2, return_full_text=False)
    assert [len(rows) for rows in two] == [1, 1]
    set_seed(0)
    first = write("The", max_new_tokens=5, do_sample=True, temperature=0.9)
    set_seed(0)
    assert write("The", max_new_tokens=5, do_sample=True, temperature=0.9) == first
    assert write("", max_new_tokens=2)


HOSTILE = "raise SystemExit('the code of a folder ran')\n"


def run(code: str, *words: str, home: Path) -> str:
    environment = {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_who_did_not_import_the_package_opens_it_by_trust(folder, tmp_path):
    code = (
        "import sys\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "assert 'blockdiff' not in sys.modules\n"
        "try: AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "except ValueError as error: print('trust_remote_code' in str(error))\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "print(type(model).__module__)"
    )
    out = tmp_path / "again"
    assert run(code, str(folder), str(out), home=tmp_path).split() == [
        "True", "blockdiff.models.dit"
    ]  # fmt: skip
    # What it saves has the three lines, and no copy of the package's code.
    assert {path.name for path in out.glob("*.py")} == {"modeling_blockdiff.py"}
    lines = (folder / "modeling_blockdiff.py").read_text()
    assert len(lines.splitlines()) == 3
    assert (out / "modeling_blockdiff.py").read_text() == lines
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == (
        "modeling_blockdiff.DiT"
    )


def test_no_folders_code_is_ever_run(folder, tmp_path):
    """Neither by this package nor, once it is imported, by transformers."""
    bad = tmp_path / "bad"
    save_model(load_model(folder), bad, AutoTokenizer.from_pretrained(folder))
    config = json.loads((bad / "config.json").read_text())
    config["auto_map"] = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel",
                          "AutoModelForCausalLM", "AutoTokenizer")}  # fmt: skip
    (bad / "config.json").write_text(json.dumps(config))
    for name in ("modeling_blockdiff.py", "evil.py", "custom_generate.py"):
        (bad / name).write_text(HOSTILE)
    writes = bad / "custom_generate" / "generate.py"
    writes.parent.mkdir()
    writes.write_text(HOSTILE)
    assert load_model(bad).config.vocab_size == 2048
    model, _ = blockdiff.load(bad, device="cpu")
    assert model.generate(max_new_tokens=2).shape == (1, 3)
    for trust in (None, False, True):
        if trust:  # transformers runs this one, and only this, for who says so
            writes.unlink()
        assert type(AutoModel.from_pretrained(bad, trust_remote_code=trust)) is DiT
    assert blockdiff.model_card(bad).data.library_name == "blockdiff"


def test_folders_of_before_open_unchanged(folder, tmp_path):
    old = tmp_path / "old"
    save_model(load_model(folder), old)
    config = json.loads((old / "config.json").read_text())
    del config["auto_map"]
    (old / "config.json").write_text(json.dumps(config))
    for name in ("modeling_blockdiff.py", "generation_config.json", "README.md"):
        (old / name).unlink()
    x = torch.tensor([[5, 6, 7, 8]])
    for opened in (load_model(old), AutoModel.from_pretrained(old)):
        assert torch.equal(opened(x).logits, load_model(folder)(x).logits)
        assert opened.generate(x, max_new_tokens=2).shape == (1, 6)


# adapted models have it from the same base class


def adapted(**settings: object) -> Adapted:
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=16, initializer_range=0.3)
    return blockdiff.adapt(LlamaForCausalLM(config), mask_token_id=8, block_size=4, **settings)


@pytest.mark.parametrize(
    "settings", [{}, {"prediction": "same"}, {"clean": "block"}], ids=["shift", "same", "block"]
)
def test_an_adapted_model_is_at_home_too(settings, tmp_path, hub):
    model = adapted(**settings)
    x_0 = random_tokens(model, 2, 10)
    model.estimator = "enumerate"
    there = torch.ones(2, 12, dtype=torch.bool)
    there[:, 10:] = False  # the last block is padded
    found = likelihood(model, F.pad(x_0, (0, 2)), "enumerate",
                       documents=there.long() - 1, maskable=there)  # fmt: skip
    loss = model(x_0, labels=x_0).loss
    assert loss.item() == pytest.approx(found.nats_per_token, rel=1e-4)
    ids = model.generate(x_0[:, :5], max_new_tokens=6, seed=2, eos_token_id=7)
    expected = blockdiff.generate(model, x_0[:, :5].tolist(), max_new_tokens=6, seed=2, stop="none")
    for row, text in zip(ids[:, 5:].tolist(), expected.tokens, strict=True):
        end = text.index(7) + 1 if 7 in text else 6
        assert row[:end] == text[:end]
    model.generation_config.max_new_tokens = 3
    save_model(model, tmp_path)
    opened = load_model(tmp_path)
    assert opened.generate(x_0[:1, :5], do_sample=False).shape == (1, 8)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    assert "(BD3-LM)" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    opened.push_to_hub("me/adapted")
    assert "400 steps" in hub["README.md"] and "model.safetensors" in hub
    opened.resize_token_embeddings(12, mean_resizing=False)
    assert (opened.config.vocab_size, opened.config.mask_token_id) == (12, 8)
    assert opened(x_0, labels=x_0).loss.isfinite() and opened(x_0).logits.shape == (2, 10, 12)


def test_a_plain_trainer_lowers_an_adapted_models_loss(tmp_path):
    trainer = trained(adapted(), tmp_path)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    assert load_model(tmp_path / "saved").config.block_size == 4


def test_a_plain_causal_model_has_no_mask_to_lose(tmp_path):
    lm = adapted().lm
    lm.set_attn_implementation("eager")
    lm.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    x_0 = random_tokens(model, 2, 6)
    own = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model(x_0, labels=x_0).loss.item() == pytest.approx(own(x_0, labels=x_0).loss.item())
    wish = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(x_0)}
    best = own.generate(x_0, **wish, pad_token_id=0)
    assert torch.equal(model.generate(x_0, **wish, pad_token_id=0), best)
    model.resize_token_embeddings(12, mean_resizing=False)
    assert model.config.mask_token_id == model.config.vocab_size == 12


# resizing


@pytest.mark.parametrize("kind", ["bd3lm", "ar"])
def test_a_resized_vocabulary(kind, tmp_path):
    model = network(kind)
    x, mask = random_tokens(model, 2, 8), model.config.mask_token_id
    before = model(x).logits
    model.drawable = torch.ones(9, dtype=torch.bool)
    model.resize_token_embeddings(11, pad_to_multiple_of=8, mean_resizing=False)
    assert (model.config.vocab_size, model.config.mask_token_id) == (16, mask)
    assert model.drawable.tolist() == [True] * 11 + [False] * 5
    assert torch.allclose(model(x).logits[..., :9], before, atol=1e-5), "rows and biases are kept"
    assert model(x).logits.shape[-1] == 16 and model.get_output_embeddings().bias.shape == (16,)
    assert model(x, labels=x).loss.isfinite()
    text = model.generate(x[:, :3], max_new_tokens=8)
    assert not (text == mask).any() and text.max() < 11
    save_model(model, tmp_path)
    saved = zip(load_model(tmp_path).parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in saved)
    model.resize_token_embeddings(mask + 1)
    assert torch.allclose(model(x).logits, before, atol=1e-5)
    assert model.config.mask_token_id == mask
    assert len(model.drawable) == 9
    with pytest.raises(InputError, match="no room for the mask token, whose id is 8"):
        model.resize_token_embeddings(mask)
    assert model.config.vocab_size == 9 and len(model.get_input_embeddings().weight) == 9


# the card


METRICS = {"eval_perplexity": 20.0, "eval_stderr": 0.05}
RUN = {
    "data": ["Salesforce/wikitext", "/home/somebody/private/notes.txt"], "batch_size": 8,
    "lr": 3e-4, "length": 12, "objective": "bd3lm", "estimator": "exact_k", "seed": 1,
    "init_from": "runs/x/ar", "steps": 500, "run": {"finished": {"steps": 400, "metrics": METRICS}},
}  # fmt: skip
MEASURED = {
    "data": "pydoc", "kind": "bd3lm", "perplexity": 40.0, "stderr": 0.02, "part": "validation",
    "bits_per_byte": 1.5, "bits_per_byte_stderr": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("shape", ["one", "list", "named"])
def test_a_card_tells_what_its_folder_tells(model, tmp_path, shape):
    record = {"one": MEASURED, "list": [MEASURED, {"data": "x", "error": "out of reach"}],
              "named": {"commands": ["…"], "held_out": MEASURED}}[shape]  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    save_model(model, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for words in (
        "(BD3-LM)", "blocks of L' = 4", "400 steps of 96 tokens", "Salesforce/wikitext, notes.txt",
        "masks drawn by exact_k", "≤ 20.00 ± 1.00", "pydoc (validation)", "≤ 40.00 ± 0.80",
        "≤ 1.500 ± 0.010", f'blockdiff.load("{tmp_path.name}")',
    ):  # fmt: skip
        assert words in text, words
    assert "somebody" not in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.datasets == ["Salesforce/wikitext"] and data.pipeline_tag == "text-generation"
    assert data.eval_results[0].metric_value == 40.0
    assert str(blockdiff.model_card(tmp_path)) == text.rstrip("\n") + "\n"


def test_a_card_of_nothing_guesses_nothing(tmp_path):
    save_model(network("ar"), tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "autoregressive" in text and "Trained" not in text and "Measured" not in text


def test_a_card_of_somebody_elses_stays(model, tmp_path):
    (tmp_path / "README.md").write_text("Mine.")
    save_model(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."


@pytest.mark.parametrize("text", ["{", "3", "\xff"])
def test_a_damaged_evaluation_loses_no_model(model, tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"no model card was written: .*evaluation\.json"):
        save_model(model, tmp_path)
    assert load_model(tmp_path).config.vocab_size == 9
    with pytest.raises(InputError, match=r"evaluation\.json"):
        blockdiff.model_card(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """What is uploaded, by name; nothing is asked of a hub."""
    sent: dict[str, str] = {}

    def commit(self, repo_id, operations, **_):
        for one in operations:
            sent[one.path_in_repo] = (
                Path(one.path_or_fileobj).read_bytes().decode("utf-8", "replace")
            )

    def made(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})()

    def no_card(*_, **__):
        raise LocalEntryNotFoundError("no card")

    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "create_repo", made)
    monkeypatch.setattr(ModelCard, "load", no_card)
    return sent


def test_push_to_hub_brings_a_card_with_figures(model, tmp_path, hub, monkeypatch):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    save_model(model, tmp_path)
    opened = load_model(tmp_path)
    opened.push_to_hub("me/tiny", tags=["mine"])
    assert {"config.json", "model.safetensors", "generation_config.json", "modeling_blockdiff.py",
            "README.md"} <= set(hub)  # fmt: skip
    text = hub["README.md"]
    assert '"me/tiny"' in text and "400 steps" in text and "≤ 20.00 ± 1.00" in text
    assert {"mine", "block-diffusion"} <= set(ModelCard(text).data.tags)
    with torch.no_grad():  # trained since: the figures are another model's
        opened.embedding.weight += 1
    opened.push_to_hub("me/tiny")
    assert "400 steps" not in hub["README.md"] and "(BD3-LM)" in hub["README.md"]
    opened.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/tiny")
    assert "(BD3-LM)" in hub["README.md"] and "automatically generated" not in hub["README.md"]
    own = ModelCard("---\nlicense: mit\n---\nWritten by hand.")
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: own)
    opened.push_to_hub("me/tiny")
    assert hub["README.md"].endswith("Written by hand.")


def test_training_and_its_card(tmp_path, starter):
    """A run of this package leaves a card with its validation."""
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and many words came after it. " * 60)
    out = tmp_path / "run"
    config = blockdiff.TrainConfig(
        out=str(out), data=str(text), vocab_size=280, length=16, batch_size=2, steps=1, warmup=1,
        eval_windows=1, report_to="none", validation_data=str(text), preset="nano",
    )  # fmt: skip
    blockdiff.train(config, progress=False)
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "1 steps of 32 tokens" in readme and "validation at the end" in readme
    assert "±" in readme or "s.e." in readme
    assert card.CARD_MARK in readme
    blockdiff.train(blockdiff.TrainConfig(**{**vars(config), "overwrite": True}), progress=False)
    (out / "README.md").write_text("My own words.")
    with pytest.raises(InputError, match=r"holds README\.md"):
        blockdiff.train(
            blockdiff.TrainConfig(**{**vars(config), "overwrite": True}), progress=False
        )


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    """docs/transformers.md, block by block, in one folder."""
    page = Path(__file__).parents[1] / "docs" / "transformers.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert names["loss"].item() > 0
    assert names["model"].generation_config.max_new_tokens == 16
