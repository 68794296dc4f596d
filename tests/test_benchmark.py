"""The benchmarks compare like with like: the naive step computes what the fast one does."""

import json

import pytest
import torch

from blockdiff import cli, objectives
from blockdiff.benchmark.compare import Timing, ratio
from blockdiff.benchmark.naive import naive_log_probabilities, naive_nats
from blockdiff.benchmark.options import BenchmarkOptions
from blockdiff.benchmark.training import useful_flops
from blockdiff.errors import InputError
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.noising import exact_k, stratified_noise


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        20, 16, 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, cond_size=8,
        dropout=0.0, initial_gate=1.0, initial_shift=0.5,
    )  # fmt: skip
    return DiT(config)


def test_the_naive_step_has_the_same_loss_and_gradients(model: DiT) -> None:
    x_0 = torch.randint(0, 19, (3, 16))
    maskable = objectives.maskable_positions(x_0)
    noise = stratified_noise(3, model.config.layout, torch.Generator().manual_seed(0))
    draw = exact_k(x_0, model.config.layout, noise, maskable, 19)
    gradients = []
    for law in (naive_nats, objectives.bd3lm):
        model.zero_grad()
        nats = law(model, x_0, draw)
        nats.sum().backward()
        gradients.append([nats.detach(), *(p.grad.clone() for p in model.parameters())])
    for slow, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_the_naive_step_edits_all_logits(model: DiT) -> None:
    """[B, 2L, V] of them: certainty where nothing is masked, no mask token anywhere."""
    x_0 = torch.randint(0, 19, (2, 16))
    x_t = x_0.clone()
    x_t[:, 4:6] = 19
    log_p = naive_log_probabilities(model, x_t, x_0)
    assert log_p.shape == (2, 32, 20)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 32))
    assert (log_p[..., 19] == -torch.inf).all()
    assert (log_p.exp().amax(-1) == 1).sum() == 2 * 30


def test_ratios_are_taken_pair_by_pair() -> None:
    slow, fast = Timing("a", [2.0, 9.0, 6.0], None), Timing("b", [1.0, 3.0, 3.0], None)
    assert ratio(slow, fast) == {"median": 2.0, "lowest": 2.0, "highest": 3.0}


def test_useful_flops_grow_as_they_should() -> None:
    """Twice the batch is twice the work; a step of the paper's network at L = 1024 is 1.3 TFLOP."""
    assert useful_flops(BenchmarkOptions(batch_size=32)) == pytest.approx(
        2 * useful_flops(BenchmarkOptions(batch_size=16))
    )
    paper = BenchmarkOptions("small", 50258, 1024, 16, 1)
    assert useful_flops(paper) == pytest.approx(1.3e12, rel=0.1)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["benchmark", "--length", "16", "--batch-size", "2", "--vocab-size", "50"]
    cli.main([*words, "--repeats", "2", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert set(record["steps"]) == {"naive", "ours", "ar"}
    assert all(len(step["seconds"]) == 2 for step in record["steps"].values())
    assert record["machine"]["float32_gflops"] > 0 and record["share_of_matrix_rate"] > 0
    with pytest.raises(InputError, match="at least 1"):
        BenchmarkOptions(length=0)
