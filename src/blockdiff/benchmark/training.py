"""`blockdiff benchmark`: a training step of ours, of AR, and the naive one, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from blockdiff import objectives
from blockdiff.benchmark.compare import Machine, Timing, alternate, measure_machine, ratio
from blockdiff.benchmark.naive import naive_nats
from blockdiff.benchmark.options import BenchmarkOptions
from blockdiff.models.config import PRESETS, DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.hub import default_device
from blockdiff.noising import exact_k, stratified_noise
from blockdiff.training.precision import use_bf16


def benchmark_training(options: BenchmarkOptions) -> dict[str, Any]:
    """Seconds, tokens per second, memory and ratios of the three steps, as one record.

    A step is forward, backward, clipping and AdamW on random tokens, dropout 0.
    """
    device = default_device()
    machine = measure_machine(device)
    bf16 = use_bf16(options.precision, device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (options.batch_size, options.length)
    x_0 = torch.randint(options.vocab_size - 1, shape, generator=generator, device=device)
    works = {
        "naive": _step(options, x_0, "naive", bf16=False, fused=False),
        "ours": _step(options, x_0, "bd3lm", bf16=bf16, fused=True),
        "ar": _step(options, x_0, "ar", bf16=bf16, fused=True),
    }
    timings = alternate(works, options.repeats, device)
    return {
        "options": {**asdict(options), "precision": "bf16" if bf16 else "float32"},
        "machine": asdict(machine),
        "steps": {name: _record(timing, x_0.numel()) for name, timing in timings.items()},
        "naive_over_ours": ratio(timings["naive"], timings["ours"]),
        "ours_over_ar": ratio(timings["ours"], timings["ar"]),
        "share_of_matrix_rate": _share(options, timings["ours"], machine, bf16),
    }


def _step(
    options: BenchmarkOptions, x_0: Tensor, kind: str, *, bf16: bool, fused: bool
) -> Callable[[], None]:
    """A training step on its own network and optimizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(PRESETS[options.preset])
    model = DiT(
        DiTConfig(
            options.vocab_size, options.length, options.block_size, causal=kind == "ar",
            dropout=0.0, initial_gate=1.0, **sizes,
        )
    )  # fmt: skip
    model.to(device=x_0.device)  # type: ignore[call-arg]
    model.attention_backend = options.backend
    if options.compile and kind != "naive":
        model.compile_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, fused=fused)
    generator = torch.Generator(x_0.device).manual_seed(1)
    maskable = objectives.maskable_positions(x_0)
    layout = model.config.layout

    def step() -> None:
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=bf16):
            if kind == "ar":
                nats = objectives.ar(model, x_0, maskable)
            else:
                noise = stratified_noise(len(x_0), layout, generator)
                draw = exact_k(x_0, layout, noise, maskable, model.config.mask_token_id)
                law = naive_nats if kind == "naive" else objectives.bd3lm
                nats = law(model, x_0, draw)
        (nats.sum() / maskable.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _record(timing: Timing, tokens: int) -> dict[str, object]:
    return {
        "seconds": timing.seconds,
        "median_seconds": timing.median,
        "tokens_per_second": tokens / timing.median,
        "peak_bytes": timing.peak_bytes,
    }


def useful_flops(options: BenchmarkOptions) -> float:
    """FLOPs of a step that no shortcut saves: 2 a multiply-add, backward twice the forward.

    Both streams through every layer but the clean one's last (keys and values only), attention
    over visible pairs, and the output layer at the masked positions: (L' + 1)/2L' of them.
    """
    sizes = PRESETS[options.preset]
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    length, block = options.length, options.block_size
    tokens = options.batch_size * length
    per_layer = 2 * 12 * width**2
    body = tokens * (2 * layers * per_layer - 2 * 10 * width**2)
    visible = length * (length + block) / 2  # of each stream, keys a query
    attention = options.batch_size * 2 * layers * 4 * width * visible
    masked = tokens * (block + 1) / (2 * block)
    output = masked * 2 * width * options.vocab_size
    return 3 * (body + attention + output)


def _share(options: BenchmarkOptions, timing: Timing, machine: Machine, bf16: bool) -> float:
    rate = machine.bf16_gflops if bf16 else machine.float32_gflops
    return useful_flops(options) / timing.median / (rate * 1e9)


def describe(record: dict[str, Any]) -> str:
    """A record for people."""
    machine, steps = record["machine"], record["steps"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads: "
        f"{machine['float32_gflops']:.0f} GFLOP/s float32, {machine['bf16_gflops']:.0f} bf16, "
        f"copying {machine['copy_gb_per_s']:.1f} GB/s",
    ]
    for name, step in steps.items():
        peak = step["peak_bytes"]
        memory = "" if peak is None else f", peak {peak / 2**30:.2f} GiB"
        lines.append(
            f"{name:>6}: {step['median_seconds']:.3f} s a step, "
            f"{step['tokens_per_second']:,.0f} tokens/s{memory}"
        )
    for key, label in (("naive_over_ours", "naive / ours"), ("ours_over_ar", "ours / AR")):
        pair = record[key]
        lines.append(
            f"{label}: {pair['median']:.2f} (pairs {pair['lowest']:.2f} to {pair['highest']:.2f})"
        )
    lines.append(
        f"useful FLOPs at {100 * record['share_of_matrix_rate']:.0f}% of the machine's own rate in "
        f"{record['options']['precision']}"
    )
    return "\n".join(lines)
