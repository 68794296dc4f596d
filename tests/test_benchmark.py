"""The benchmarks compare like with like: the naive step computes what the fast one does."""

import json

import pytest
import torch

from blockdiff import cli, objectives
from blockdiff.apps.benchmark import compare, report, works
from blockdiff.apps.benchmark.compare import Machine, Timing, Work, alternate, ratio
from blockdiff.apps.benchmark.naive import (
    naive_log_probabilities,
    naive_nats,
    naive_sample,
    naive_step,
)
from blockdiff.apps.benchmark.options import GPT2_BF16, NAIVE_BF16, BenchmarkOptions
from blockdiff.apps.benchmark.report import body_parameters, describe, useful_flops
from blockdiff.errors import InputError
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.noising import exact_k, stratified_noise
from blockdiff.training.config import Precision
from processes import CONTEXT


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


def test_the_papers_small_network_has_its_weights() -> None:
    """12 layers of 12 · 768² weights: 85M."""
    assert body_parameters("small") == 84_934_656


def test_the_naive_sampler_reads_what_training_reads(model: DiT) -> None:
    """Block by block after its cached clean prefix: the same p as one dense pass."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 19, (1, 16), generator=generator)
    x_t = x_0.masked_fill(torch.rand(1, 16, generator=generator) < 0.6, 19)
    with torch.no_grad():
        whole = naive_log_probabilities(model, x_t, x_0)[:, 16:].exp()
        cached = None
        for start in range(0, 16, 4):
            block, position = slice(start, start + 4), torch.arange(start, start + 4)
            p, _ = naive_step(model, x_t[:, block], position, cached)
            torch.testing.assert_close(p.float(), whole[:, block], rtol=1e-4, atol=1e-6)
            _, cached = naive_step(model, x_0[:, block], position, cached)


def test_the_naive_sampler_writes_whole_blocks(model: DiT) -> None:
    text, evaluations = naive_sample(model.eval(), [3], 11, 0.9)
    assert text[0] == 3 and len(text) == 12 and 19 not in text
    assert evaluations == 11 + 3  # one a token, one to cache each block


class Count:
    """A work that counts its own runs, in its process."""

    def __init__(self, tokens: int) -> None:
        self.runs, self.tokens = 0, tokens

    def __call__(self) -> dict[str, float]:
        self.runs += 1
        torch.ones(300, 300).sum()
        return {"tokens": self.tokens, "runs": self.runs}


def broken() -> None:
    raise ValueError("out of paper")


def test_alternatives_live_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    works = {"one": Work(Count, (10,)), "two": Work(Count, (1000,), tuned=False)}
    timings = alternate(works, 2, torch.device("cpu"), warm_ups=1)
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]
    assert all(timing.counts["runs"] > 3 for timing in timings.values()), "short work is repeated"
    assert timings["one"].per_token[0] == timings["one"].seconds[0] / 10
    assert all(timing.peak_bytes is None or timing.peak_bytes > 0 for timing in timings.values())
    monkeypatch.setattr(compare, "START", CONTEXT)
    with pytest.raises(InputError, match="bad failed: ValueError: out of paper"):
        alternate({"bad": Work(broken)}, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def machine() -> Machine:
    return compare.measure_machine(torch.device("cpu"))


TINY = ["--length", "16", "--batch-size", "2", "--vocab-size", "50", "--repeats", "1"]


@pytest.mark.parametrize(
    ("work", "alternatives", "figure"),
    [
        ("train", {"naive", NAIVE_BF16, "ours", "ar"}, "share_of_matrix_rate"),
        (
            "sample",
            {"naive", NAIVE_BF16, "ours", "int8", "ar", "gpt2", GPT2_BF16},
            "share_of_read_rate",
        ),
        ("attention", {"dense", "blockwise"}, "peak_memory_ratio"),
        ("evaluate", {"naive", NAIVE_BF16, "separate", "ours"}, "torch"),
    ],
)
def test_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, machine: Machine,
    work: str, alternatives: set[str], figure: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(report, "measure_machine", lambda device: machine)
    monkeypatch.setattr(report, "resolve_precision", lambda precision, device: "bf16")
    monkeypatch.setattr(compare, "START", CONTEXT)
    cli.main(["benchmark", work, *TINY, "--tokens", "8", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert set(record["alternatives"]) == alternatives
    assert all(done["tokens_per_second"] > 0 for done in record["alternatives"].values())
    assert record["machine"]["float32_gflops"] > 0 and record[figure]
    assert all(pair["lowest"] <= pair["median"] for pair in record["ratios"].values())
    if NAIVE_BF16 in alternatives:
        assert f"{NAIVE_BF16} / ours" in record["ratios"] and NAIVE_BF16 in describe(record)
    assert "tokens/s" in describe(record) and not record["left_out"]


def test_a_processor_without_bf16_leaves_its_autocast_out(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    """There it is slower than float32: a ratio to it would flatter."""
    monkeypatch.setattr(report, "measure_machine", lambda device: machine)
    monkeypatch.setattr(report, "resolve_precision", lambda precision, device: "float32")
    monkeypatch.setattr(
        report, "alternate", lambda works, *rest: {name: Timing(name, [1.0]) for name in works}
    )
    record = report.benchmark("train", BenchmarkOptions(length=16))
    assert set(record["alternatives"]) == {"naive", "ours", "ar"}
    assert set(record["ratios"]) == {"naive / ours", "ours / ar"}
    assert record["left_out"] == {NAIVE_BF16: report.NO_BF16}
    assert f"{NAIVE_BF16}: not measured on this processor" in describe(record)


def test_the_naive_step_runs_under_autocast(model: DiT) -> None:
    """The same code under its one line: the same numbers but for the rounding."""
    x_0 = torch.randint(0, 19, (3, 16))
    x_t = x_0.masked_fill(torch.rand(3, 16) < 0.5, 19)
    with torch.no_grad():
        exact = naive_log_probabilities(model, x_t, x_0)
        with works.autocast(BenchmarkOptions(precision="float32"), x_0.device, NAIVE_BF16):
            rounded = naive_log_probabilities(model, x_t, x_0)
    rounded = rounded.float()  # on a CPU autocast leaves a log-softmax in bf16
    finite = exact.isfinite()
    assert torch.equal(finite, rounded.isfinite()) and not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded[finite], exact[finite], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "precision", "bf16"),
    [
        ("naive", "bf16", False), (NAIVE_BF16, "float32", True),
        ("ours", "bf16", True), ("ours", "float32", False),
    ],
)  # fmt: skip
def test_who_runs_in_bf16(kind: str, precision: Precision, bf16: bool) -> None:
    with works.autocast(BenchmarkOptions(precision=precision), torch.device("cpu"), kind):
        assert torch.is_autocast_enabled("cpu") == bf16


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ({"length": 0}, {"preset": "huge"}, {"dropout": 1.0}, {"top_p": 0.0}):
        with pytest.raises(InputError):
            BenchmarkOptions(**bad)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["benchmark", "cooking"])
    assert stopped.value.code == 2 and "'cooking'" in capsys.readouterr().err
