"""What is timed: each function builds one alternative in its worker and gives what runs.

Every random choice is seeded, weights are random: a network's speed does not depend on them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from blockdiff import objectives
from blockdiff.apps.benchmark.compare import Run
from blockdiff.apps.benchmark.naive import naive_nats, naive_sample
from blockdiff.apps.benchmark.options import (
    GPT2_BF16,
    GPTS,
    NAIVE,
    NAIVE_BF16,
    NAIVES,
    BenchmarkOptions,
)
from blockdiff.attention import attend, make_mask
from blockdiff.estimators import make_estimator
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.layout import BlockLayout
from blockdiff.models.config import PRESETS, DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.weights import convert
from blockdiff.noising import Noise, exact_k, stratified_noise
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.training.parallel import recompute_activations


def build_model(options: BenchmarkOptions, device: str, *, causal: bool = False) -> DiT:
    """The network of the options, layers open as after training, in training mode."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(PRESETS[options.preset])
    config = DiTConfig(
        options.vocab_size, options.length, options.block_size, causal=causal,
        dropout=options.dropout, initial_gate=1.0, **sizes,
    )  # fmt: skip
    model = DiT(config)
    model.to(device=torch.device(device))  # type: ignore[call-arg]
    model.attention_backend = options.backend
    return model.train()


def random_text(options: BenchmarkOptions, device: str) -> Tensor:
    """x_0 int64 [B, L] without the mask token."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, options.length)
    return torch.randint(options.vocab_size - 1, shape, generator=generator).to(device)


def autocast(options: BenchmarkOptions, device: torch.device, kind: str) -> AbstractContextManager:
    """What an alternative runs under: the naive code in float32, or under the one line for bf16."""
    bf16 = kind == NAIVE_BF16 or (kind != NAIVE and options.precision == "bf16")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def training_step(options: BenchmarkOptions, device: str, kind: str) -> Run:
    """A step of `NAIVES`, "ours" or "ar": forward, backward, clipping, AdamW, on random tokens."""
    model = build_model(options, device, causal=kind == "ar")
    x_0 = random_text(options, device)
    ours = kind not in NAIVES
    if options.checkpoint_activations and ours:
        recompute_activations(model)
    if options.compile and ours:
        model.compile_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, fused=ours)
    generator = torch.Generator(x_0.device).manual_seed(1)
    maskable = objectives.maskable_positions(x_0)
    layout = model.config.layout

    def run() -> dict[str, float]:
        with autocast(options, x_0.device, kind):
            if kind == "ar":
                nats = objectives.ar(model, x_0, maskable)
            else:
                noise = stratified_noise(len(x_0), layout, generator)
                draw = exact_k(x_0, layout, noise, maskable, model.config.mask_token_id)
                law = objectives.bd3lm if ours else naive_nats
                nats = law(model, x_0, draw)
        (nats.sum() / maskable.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens": x_0.numel()}

    return run


def new_tokens(options: BenchmarkOptions) -> int:
    """As many as asked for, made to end a block behind a prompt of one token."""
    new = -(-options.tokens // options.block_size) * options.block_size - 1
    return new if new > 0 else options.block_size


def sampling(options: BenchmarkOptions, device: str, kind: str) -> Run:
    """Text after one token of prompt: `NAIVES` (one row), "ours", "int8", "ar" or `GPTS`."""
    if kind in GPTS:
        return _gpt2(options, device, torch.bfloat16 if kind == GPT2_BF16 else torch.float32)
    model = build_model(options, device, causal=kind == "ar").eval()
    ours = kind not in NAIVES
    if options.compile and ours:
        model.compile_layers()
    if ours:
        precision = "int8" if kind == "int8" else options.precision
        convert(model, precision, model.device, few_tokens=not options.compile)
    new = new_tokens(options)
    if not ours:

        def run_naive() -> dict[str, float]:
            with autocast(options, model.device, kind):
                text, evaluations = naive_sample(model, [0], new, options.top_p)
            return {"tokens": len(text) - 1, "nfe": evaluations, "rows": 1}

        return run_naive
    wish = SamplingOptions(max_new_tokens=new, top_p=options.top_p, stop="none")

    def run() -> dict[str, float]:
        done = generate_tokens(model, [[0]] * options.batch_size, wish)
        return {"tokens": sum(map(len, done.tokens)), "nfe": max(done.nfe), "rows": len(done.nfe)}

    return run


def _gpt2(options: BenchmarkOptions, device: str, dtype: torch.dtype) -> Run:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = PRESETS[options.preset]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=options.vocab_size, n_positions=max(options.length, options.tokens),
        n_embd=sizes["hidden_size"], n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"], bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    model.to(device=torch.device(device), dtype=dtype)
    prompt = torch.zeros(options.batch_size, 1, dtype=torch.int64, device=device)
    new = new_tokens(options)

    def run() -> dict[str, float]:
        text = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_p=options.top_p,
            top_k=0, max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        return {"tokens": (text.shape[1] - 1) * len(text), "nfe": new, "rows": len(text)}

    return run


def attention(options: BenchmarkOptions, device: str, backend: str) -> Run:
    """Forward and backward of both streams' attention in one layer."""
    sizes = PRESETS[options.preset]
    heads = sizes["num_attention_heads"]
    layout = BlockLayout(options.length, options.block_size)
    shape = (options.batch_size, heads, 2 * options.length, sizes["hidden_size"] // heads)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, outer = (
        torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    mask = make_mask(layout, "two_stream", backend, q.device)

    def run() -> dict[str, float]:
        out = attend(q, k, v, mask)
        torch.autograd.grad(out, leaves, outer)
        return {"tokens": options.batch_size * options.length}

    return run


def exact_likelihood(options: BenchmarkOptions, device: str, kind: str) -> Run:
    """`enumerate` as it is ("ours"), or a two-stream pass for each of the 2^L' − 1 masks.

    Those passes are the naive network's (`NAIVES`), or the fast one's ("separate"): then only the
    sharing of the clean pass differs.
    """
    model = build_model(options, device).eval()
    x_0 = random_text(options, device)
    layout = model.config.layout
    maskable = objectives.maskable_positions(x_0)
    law = naive_nats if kind in NAIVES else objectives.bd3lm
    draw = make_estimator("enumerate")(
        x_0, layout, Noise(x_0, x_0), maskable, model.config.mask_token_id
    )

    @torch.no_grad()
    def run() -> dict[str, float]:
        with autocast(options, x_0.device, kind):
            if kind == "ours":
                likelihood(model, x_0, estimator="enumerate")
            else:
                for part in draw.split(len(x_0)):
                    law(model, x_0, part)
        return {"tokens": x_0.numel()}

    return run
