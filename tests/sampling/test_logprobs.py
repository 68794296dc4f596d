"""Log-probabilities of what was written: the path's own, and the bound of the text, named apart."""

import json
import math

import pytest
import torch

import blockdiff
from blockdiff import Engine, SamplingOptions, cli
from blockdiff.evaluation.score import score_tokens
from blockdiff.sampling.generate import generate_tokens
from helpers import sampling_steps, tiny_model

MASK = 8
KINDS = {
    "bd3lm": {"block_size": 4, "length": 12},
    "causal clean stream": {"block_size": 4, "length": 12, "clean_stream": "causal"},
    "mdlm": {"block_size": 12, "length": 12},
}
ORDERS = [{"sampler": "first_hitting"}, {"threshold": 0.3}, {"sampler": "ancestral", "steps": 2}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_they_are_those_of_the_evaluation_that_fixed_each_token(kind, order):
    """Each step's canvas is run once more, densely and without a cache."""
    model = tiny_model(vocab_size=9, **KINDS[kind])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 0, 1]]
    wish = {"max_new_tokens": 7, "stop": "none", "temperature": 0.7, "top_p": 0.9, **order}
    steps = sampling_steps(model, prompts, logprobs=True, **wish)
    seen = 0
    for step in steps:
        before = step.tokens.masked_fill(step.fixed, MASK)[:, :12]
        for row, column in step.fixed.nonzero().tolist():
            x_t = torch.full((1, 12), MASK)
            x_t[0, : before.shape[1]] = before[row]
            x_0 = x_t.where(x_t != MASK, 0)
            with torch.no_grad():
                logits = model(x_t, x_0=x_0, backend="dense").logits[0, column].double()
            logits[MASK] = -math.inf
            expected = logits.log_softmax(-1)[step.tokens[row, column]].item()
            assert step.logprobs[row, column].item() == pytest.approx(expected, abs=1e-5)
            seen += 1
    assert seen >= 21
    done = generate_tokens(model, prompts, SamplingOptions(logprobs=True, **wish))
    for row, prompt in enumerate(prompts):
        own = steps[-1].logprobs[row, len(prompt) : len(prompt) + 7].tolist()
        assert done.path_logprobs[row] == pytest.approx(own, abs=1e-6)
        assert not math.isnan(sum(own)) and len(own) == len(done.tokens[row])
    assert done.tokens == generate_tokens(model, prompts, SamplingOptions(**wish)).tokens


def test_of_an_ar_model_they_sum_to_the_text():
    model = tiny_model(vocab_size=9, length=12, causal=True)
    prompts = [[1, 2], [3, 4, 5]]
    wish = SamplingOptions(max_new_tokens=6, stop="none", logprobs=True, seed=2)
    done = generate_tokens(model, prompts, wish)
    exact = [s.nats for s in score_tokens(model, prompts, done.tokens, greedy=False)]
    assert [-sum(row) for row in done.path_logprobs] == pytest.approx(exact, abs=1e-4)


def test_only_rows_that_ask_have_them():
    model = tiny_model(vocab_size=9, length=12, block_size=4)
    engine = Engine(model)
    engine.admit([1], SamplingOptions(max_new_tokens=3, stop="none"))
    engine.step()
    asks = engine.admit([2, 3], SamplingOptions(max_new_tokens=6, stop="none", logprobs=True))
    while engine.active:
        step = engine.step()
    row = step.rows.tolist().index(asks)
    assert torch.isnan(step.logprobs[1 - row]).all()
    assert not torch.isnan(step.logprobs[row, 2:8]).any()
    assert torch.isnan(step.logprobs[row, :2]).all()
    engine.drop(0)
    assert engine.rows.logprobs.shape[0] == 1


def test_the_command_names_both(capsys):
    words = [
        "generate",
        "starter",
        "The",
        "--max-new-tokens",
        "5",
        "--samples",
        "2",
        "--stop",
        "none",
    ]
    cli.main([*words, "--precision", "float32", "--logprobs", "--likelihood", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [len(row) for row in found["path_logprobs"]] == [5, 5]
    model, tokenizer = blockdiff.load("starter")
    ids = [tokenizer.bos_token_id, *tokenizer.encode("The", add_special_tokens=False)]
    done = blockdiff.generate(model, [ids] * 2, max_new_tokens=5, stop="none", logprobs=True)
    for own, other in zip(found["path_logprobs"], done.path_logprobs, strict=True):
        assert own == pytest.approx(other, abs=1e-4)
    bounds = score_tokens(model, [ids] * 2, done.tokens, greedy=False)
    assert [b["nats"] for b in found["likelihood"]] == pytest.approx(
        [b.nats for b in bounds], abs=1e-3
    )
    assert all(b["error"] == 0 for b in found["likelihood"])  # L' = 4: exact over masks


@pytest.mark.parametrize("flag", ["--logprobs", "--likelihood"])
def test_they_are_shown_in_json(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "starter", "The", flag])
    assert stop.value.code == 2 and "--json" in capsys.readouterr().err
