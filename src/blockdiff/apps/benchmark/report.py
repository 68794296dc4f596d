"""`blockdiff benchmark WORK`: a comparison as one record, for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

import torch

from blockdiff.apps.benchmark import works
from blockdiff.apps.benchmark.compare import (
    Machine,
    Run,
    Timing,
    Work,
    alternate,
    measure_machine,
    ratio,
)
from blockdiff.apps.benchmark.options import (
    GPT2,
    GPT2_BF16,
    GPTS,
    NAIVE,
    NAIVE_BF16,
    NAIVES,
    WORKS,
    BenchmarkOptions,
)
from blockdiff.attention import choose_backend
from blockdiff.checks import one_of
from blockdiff.device import choose_device
from blockdiff.models.config import PRESETS
from blockdiff.models.weights import resolve_precision
from blockdiff.training.config import Precision

# work → (what builds an alternative, its alternatives, the ratios that answer its question)
_COMPARISONS: dict[str, tuple[Callable[..., Run], tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "train": (
        works.training_step, (*NAIVES, "ours", "ar"),
        ((NAIVE, "ours"), (NAIVE_BF16, "ours"), ("ours", "ar")),
    ),
    "sample": (
        works.sampling, (*NAIVES, "ours", "int8", "ar", *GPTS),
        (
            (NAIVE, "ours"), (NAIVE_BF16, "ours"), (GPT2, "ours"), (GPT2_BF16, "ours"),
            (NAIVE, "int8"), ("ours", "ar"),
        ),
    ),
    "attention": (works.attention, ("dense", "blockwise"), (("dense", "blockwise"),)),
    "evaluate": (
        works.exact_likelihood, (*NAIVES, "separate", "ours"),
        ((NAIVE, "ours"), (NAIVE_BF16, "ours"), ("separate", "ours")),
    ),
}  # fmt: skip
# They run as their users run them: nothing tuned for them.
_UNTUNED = (*NAIVES, *GPTS)
NO_BF16 = "not measured on this processor, which has no bf16 instructions"


def benchmark(work: str, options: BenchmarkOptions) -> dict[str, Any]:
    """Times the alternatives of a work, "train", "sample", "attention" or "evaluate".

    The record: options with the precision resolved, the machine's measured limits, each
    alternative's seconds, tokens per second and peak memory, those left out and why, the ratios per
    token, pair by pair, and the shares of the machine's own rates. Raises `InputError` for an
    unknown work.
    """
    one_of("work", work, WORKS)
    device = choose_device(options.device)
    precision = resolve_precision(options.precision, device)
    options = replace(options, precision=cast(Precision, precision))
    machine = measure_machine(device)
    make, kinds, pairs = _COMPARISONS[work]
    if work == "attention" and device.type == "cuda":
        kinds, pairs = (*kinds, "flex"), (*pairs, ("dense", "flex"))
    left_out = {}
    if resolve_precision("auto", device) != "bf16":
        left_out = {kind: NO_BF16 for kind in kinds if kind in (NAIVE_BF16, GPT2_BF16)}
        kinds = tuple(kind for kind in kinds if kind not in left_out)
        pairs = tuple(pair for pair in pairs if not left_out.keys() & set(pair))
    timings = alternate(
        {
            kind: Work(make, (options, str(device), kind), tuned=kind not in _UNTUNED)
            for kind in kinds
        },
        options.repeats,
        device,
    )
    record: dict[str, Any] = {
        "work": work,
        "options": asdict(options),
        "torch": torch.__version__,
        "machine": asdict(machine),
        "alternatives": {name: _record(timing) for name, timing in timings.items()},
        "left_out": left_out,
        "ratios": {f"{a} / {b}": ratio(timings[a], timings[b]) for a, b in pairs},
    }
    if work == "train":
        record["share_of_matrix_rate"] = _matrix_share(options, timings["ours"], machine)
    if work == "sample":
        record["share_of_read_rate"] = _read_share(options, timings["ours"], machine)
    if work in ("train", "attention"):
        fast, slow = ("ours", NAIVE) if work == "train" else ("blockwise", "dense")
        record["peak_memory_ratio"] = _memory_ratio(timings[fast], timings[slow])
    if work == "attention":
        record["backend_of_auto"] = choose_backend("auto", device)
    return record


def _record(timing: Timing) -> dict[str, object]:
    tokens = timing.counts.get("tokens", 0)
    sampled = {}
    if "nfe" in timing.counts:  # of a row: all rows are in each evaluation
        evaluations = timing.counts["nfe"] * timing.counts["rows"]
        sampled["tokens_per_nfe"] = tokens / max(evaluations, 1)
    return {
        **sampled,
        "seconds": timing.seconds,
        "median_seconds": timing.median,
        "tokens_per_second": tokens / timing.median,
        "peak_bytes": timing.peak_bytes,
        "counts": timing.counts,
    }


def _memory_ratio(fast: Timing, slow: Timing) -> float | None:
    if fast.peak_bytes is None or slow.peak_bytes is None:
        return None
    return fast.peak_bytes / slow.peak_bytes


def body_parameters(preset: str) -> int:
    """Weights of the layers' linear maps: what every token is multiplied with."""
    sizes = PRESETS[preset]
    return 12 * sizes["hidden_size"] ** 2 * sizes["num_hidden_layers"]


def useful_flops(options: BenchmarkOptions) -> float:
    """FLOPs of a step that no shortcut saves: 2 a multiply-add, backward twice the forward.

    Both streams through every layer but the clean one's last (keys and values only), attention
    over visible pairs, and the output layer at the masked positions: (L' + 1)/2L' of them.
    """
    sizes = PRESETS[options.preset]
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    length, block = options.length, options.block_size
    tokens = options.batch_size * length
    body = 2 * tokens * (2 * body_parameters(options.preset) - 10 * width**2)
    visible = length * (length + block) / 2  # of each stream, keys a query
    attention = options.batch_size * 2 * layers * 4 * width * visible
    masked = tokens * (block + 1) / (2 * block)
    output = masked * 2 * width * options.vocab_size
    return 3 * (body + attention + output)


def _matrix_share(options: BenchmarkOptions, timing: Timing, machine: Machine) -> float:
    rate = machine.bf16_gflops if options.precision == "bf16" else machine.float32_gflops
    return useful_flops(options) / timing.median / (rate * 1e9)


def _read_share(options: BenchmarkOptions, timing: Timing, machine: Machine) -> float:
    """Each evaluation reads every weight of the layers and of the output map once."""
    width = PRESETS[options.preset]["hidden_size"]
    weights = body_parameters(options.preset) + width * options.vocab_size
    bytes_read = weights * (2 if options.precision == "bf16" else 4) * timing.counts["nfe"]
    return bytes_read / timing.median / (machine.read_gb_per_s * 1e9)


def describe(record: dict[str, Any]) -> str:
    """A record for people."""
    machine, options = record["machine"], record["options"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads: "
        f"{machine['float32_gflops']:.0f} GFLOP/s float32, {machine['bf16_gflops']:.0f} bf16, "
        f"reading {machine['read_gb_per_s']:.1f} GB/s, copying {machine['copy_gb_per_s']:.1f}",
        f"{record['work']}: {options['preset']}, L = {options['length']}, "
        f"L' = {options['block_size']}, batch {options['batch_size']}, "
        f"vocabulary {options['vocab_size']:,}; ours in {options['precision']}",
    ]
    for name, done in record["alternatives"].items():
        peak = done["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / 2**30:.2f} GiB"
        each = f", {done['tokens_per_nfe']:.2f} an evaluation" if "tokens_per_nfe" in done else ""
        lines.append(
            f"{name:>20}: {done['median_seconds']:8.3f} s, "
            f"{done['tokens_per_second']:9,.1f} tokens/s{each}{memory}"
        )
    for name, why in record.get("left_out", {}).items():
        lines.append(f"{name:>20}: {why}")
    for pair, found in record["ratios"].items():
        lines.append(
            f"{pair}: {found['median']:.2f} (pairs {found['lowest']:.2f} to {found['highest']:.2f})"
        )
    if record.get("peak_memory_ratio"):
        lines.append(f"peak memory: {record['peak_memory_ratio']:.2f} of the slow one's")
    if "share_of_matrix_rate" in record:
        share = 100 * record["share_of_matrix_rate"]
        lines.append(
            f"useful FLOPs at {share:.0f}% of the machine's own {options['precision']} rate"
        )
    if "share_of_read_rate" in record:
        share = 100 * record["share_of_read_rate"]
        lines.append(f"weights read at {share:.0f}% of the machine's own rate of reading")
    return "\n".join(lines)
