"""How noisy an estimator of the bound is: the variance of its loss and of its gradient.

D batches of text, R draws of masks for each; y_{d,r} is the loss in nats per token of a batch, or
its gradient, a vector. One-way analysis of variance, with |·|² for vectors (the trace of the
covariance):

    mask noise  = mean_d 1/(R − 1) Σ_r |y_{d,r} − ȳ_d|²
    data noise  = 1/(D − 1) Σ_d |ȳ_d − ȳ|² − mask noise / R

Both are unbiased. Their standard errors are jackknifed over batches. An estimator that costs two
passes a draw (`paired`) is compared with others through `passes`: variance × passes is the variance
at equal compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockdiff import checks
from blockdiff.categorical import fold_seed, real_dtype
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.estimators import MakeDraw, make_estimator
from blockdiff.evaluation.corpus import open_sequences, options_of_run, text_options
from blockdiff.evaluation.options import VarianceOptions
from blockdiff.laws import objective_of
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import load
from blockdiff.noising import Noise, stratified_noise
from blockdiff.printing import table_text
from blockdiff.progress import advance
from blockdiff.registry import ESTIMATORS

# The schedules of the paper's tables, and what is new.
DEFAULT_ESTIMATORS = (
    "bernoulli",
    "bernoulli+stratified",
    "bernoulli:cosine",
    "bernoulli:square",
    "bernoulli:square_root",
    "bernoulli:logarithmic",
    "clipped:0.45:0.95",
    "clipped:0.3:0.8",
    "bell",
    "exact_k",
    "exact_k+stratified",
    "paired",
    "paired+stratified",
)
_HOW = "name, bernoulli:SCHEDULE, clipped:β:ω or d3pm:T, and +stratified behind it"
# What may stand behind an estimator's name: the first of these that the estimator reads.
_SETTINGS: dict[str, tuple[type, ...]] = {
    "clip": (float, float), "timesteps": (int,), "schedule": (str,)
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """One quantity's variance, split; in nats² per token² (times 1/weight² for gradients)."""

    mask: float
    mask_stderr: float
    data: float
    data_stderr: float


@dataclass(frozen=True)
class EstimatorVariance:
    """What was measured of one estimator at one block size.

    `loss_mean` ± `loss_stderr`: nats per token, over batches. `passes`: noised copies of the text
    a draw costs. `gradient` is None when it was not asked for.
    """

    estimator: str
    block_size: int
    unbiased: bool
    passes: int
    loss_mean: float
    loss_stderr: float
    loss: Spread
    gradient: Spread | None
    batches: int
    draws: int
    batch_size: int

    def record(self) -> dict[str, object]:
        return asdict(self)


def parse_estimator(text: str) -> tuple[MakeDraw, bool]:
    """(estimator, whether its noise is stratified) of a name like `clipped:0.3:0.8+stratified`.

    Raises `InputError` for a name that says nothing.
    """
    name, plus, how = text.partition("+")
    name, *settings = name.split(":")
    reads = ESTIMATORS.find(name, "estimators").reads
    if "noise" not in reads or (plus and how != "stratified"):
        raise InputError(f"no estimator {text!r} to measure the variance of; give {_HOW}")
    setting = next((one for one in _SETTINGS if one in reads), None)
    given: dict[str, Any] = {}
    if settings or setting == "clip":
        try:
            kinds = _SETTINGS[setting or ""]
            values = [kind(value) for kind, value in zip(kinds, settings, strict=True)]
        except (KeyError, ValueError):
            raise InputError(f"estimator {text!r} is not of the form {_HOW}") from None
        given = {str(setting): tuple(values) if len(values) > 1 else values[0]}
    return make_estimator(name, **given), bool(plus)


def variance(
    model: Denoiser,
    x_0: Tensor,
    estimator: str,
    *,
    block_size: int | None = None,
    batch_size: int = 8,
    draws: int = 16,
    gradient: bool = True,
    seed: int = 0,
    documents: Tensor | None = None,
    maskable: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> EstimatorVariance:
    """Measures `estimator` (see `parse_estimator`) on sequences x_0 int64 [D·B, L].

    `batch_size` B sequences make a batch; what is left over is not used. `maskable` bool [D·B, L]:
    the tokens that count, where these are not all. `progress` is called after each draw. Raises
    `InputError` for fewer than two batches or draws, or an AR model.
    """
    checks.numbers(batch_size=batch_size, draws=draws, seed=seed)
    make, stratified = parse_estimator(estimator)
    x_0 = x_0.to(model.device)
    documents = None if documents is None else documents.to(model.device)
    batches = len(x_0) // batch_size
    if batches < 2 or draws < 2:
        raise InputError(
            f"{len(x_0)} sequences in batches of {batch_size} and {draws} draws: a variance needs "
            "at least two batches and two draws"
        )
    objective = objective_of(model.config)
    if not objective.noised:
        raise InputError("an AR model's loss has no noise of masks; give a diffusion model")
    length = x_0.shape[1]
    layout = model.config.layout_of(length, model.config.choose_block_size(block_size, length))
    was_training = model.training
    model.eval()
    losses = torch.zeros(batches, draws, dtype=torch.float64)
    means, squares = [], torch.zeros(batches, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    unbiased, passes = True, 1
    for d in range(batches):
        rows = x_0[d * batch_size : (d + 1) * batch_size]
        own = None if documents is None else documents[d * batch_size : (d + 1) * batch_size]
        counted = objective.counted(rows, model.config.keep_first, own)
        if maskable is not None:
            counted &= maskable[d * batch_size : (d + 1) * batch_size].to(counted.device)
        total = torch.zeros(sum(p.numel() for p in parameters) if gradient else 0)
        for r in range(draws):
            noise = _noise(batch_size, layout, fold_seed(seed, d, r), stratified, rows.device)
            draw = make(rows, layout, noise, counted, model.config.mask_token_id)
            unbiased, passes = draw.unbiased, len(draw.x_t) // len(rows)
            with torch.set_grad_enabled(gradient):
                nats = objective.drawn(model, rows, draw, replace(layout, documents=own))
                loss = nats.sum() / counted.sum().clamp(min=1)
            losses[d, r] = loss.item()
            if gradient:
                flat = _flat_gradient(loss, parameters)
                total += flat
                squares[d] += flat.double().square().sum()
            if progress is not None:
                progress(1)
        means.append(total / draws)
    model.train(was_training)
    of_loss = _analysis(losses.mean(1)[:, None], losses.square().sum(1), draws)
    of_gradient = _analysis(torch.stack(means).double(), squares, draws) if gradient else None
    by_batch = losses.mean(1)
    return EstimatorVariance(
        estimator, layout.block_size, unbiased, passes,
        float(by_batch.mean()), float(by_batch.std() / math.sqrt(batches)),
        of_loss, of_gradient, batches, draws, batch_size,
    )  # fmt: skip


def _noise(
    rows: int, layout: BlockLayout, seed: int, stratified: bool, device: torch.device
) -> Noise:
    generator = torch.Generator(device).manual_seed(seed)
    if stratified:
        return stratified_noise(rows, layout, generator)
    kind = {"generator": generator, "device": device, "dtype": real_dtype(device)}
    block, token = (torch.rand(rows, n, **kind) for n in (layout.blocks, layout.length))  # type: ignore[call-overload]
    tiny = torch.finfo(block.dtype).tiny
    return Noise(block.clamp(min=tiny), token.clamp(min=tiny))


def _flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient as one vector, on the CPU; zeros where the loss does not depend on a weight."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = [
        torch.zeros(p.numel()) if g is None else g.flatten().float().cpu()
        for p, g in zip(parameters, found, strict=True)
    ]
    return torch.cat(parts)


def _analysis(means: Tensor, squares: Tensor, draws: int) -> Spread:
    """From ȳ_d [D, n] and Σ_r |y_{d,r}|² [D], the split variance with jackknifed errors."""
    within = (squares - draws * means.square().sum(1)) / (draws - 1)  # [D]
    gram = means @ means.mT

    def split(kept: Tensor) -> tuple[float, float]:
        count = len(kept)
        own = gram[kept][:, kept]
        mask = within[kept].mean()
        between = (own.diagonal().sum() - own.sum() / count) / (count - 1)
        return float(mask), float(between - mask / draws)

    count = len(means)
    every = torch.arange(count)
    mask, data = split(every)
    if count < 3:
        return Spread(mask, math.nan, data, math.nan)
    left = torch.tensor([split(every[every != d]) for d in range(count)])
    errors = ((left - left.mean(0)).square().sum(0) * (count - 1) / count).sqrt()
    return Spread(mask, float(errors[0]), data, float(errors[1]))


def measure_corpus(
    model: str | Path, wish: VarianceOptions, device: str | None = None, **opening: Any
) -> list[EstimatorVariance]:
    """Measures every estimator at every block size on windows of a corpus.

    Without `block_sizes` and `estimators` it is the model's own block size and
    `DEFAULT_ESTIMATORS`. Everything is measured on the same windows. Of the text, what is None is
    the run's own, as in `evaluate_corpus`. Raises `InputError` on bad input.
    """
    given = wish.block_sizes
    sizes = None if given is None else checks.whole_numbers("block_sizes", given)
    names = list(DEFAULT_ESTIMATORS) if wish.estimators is None else wish.estimators.split(",")
    for name in names:
        parse_estimator(name)
    source, options, _ = options_of_run(model, wish.data, text_options(wish))
    network, words = load(model, tokenizer=wish.tokenizer, device=choose_device(device), **opening)
    network.float()
    sizes = (network.config.block_size,) if sizes is None else sizes
    wanted = wish.batches * wish.batch_size
    _, sequences = open_sequences(
        network, words, source, length=wish.length, windows=wanted, block_sizes=sizes, **options
    )
    total = len(sizes) * len(names) * wish.batches * wish.draws
    with advance(f"{model} on {wish.data}", total, "draws") as done:
        return [
            variance(
                network, sequences["x_0"], name, block_size=size, batch_size=wish.batch_size,
                draws=wish.draws, gradient=wish.gradient, seed=wish.seed,
                documents=sequences.get("documents"),
                maskable=sequences.get("maskable"), progress=done,
            )
            for size in sizes
            for name in names
        ]  # fmt: skip


def variance_table(found: Sequence[EstimatorVariance]) -> str:
    """What was measured, for people: the least noise of each block size first."""
    rows: list[list[str] | None] = []
    sizes = list(dict.fromkeys(x.block_size for x in found))
    for size in sizes:
        own = [x for x in found if x.block_size == size]
        for x in sorted(own, key=lambda x: x.passes * (x.gradient or x.loss).mask):
            cells = [_cell(x.passes * x.loss.mask, x.passes * x.loss.mask_stderr)]
            cells.append(_cell(x.loss.data, x.loss.data_stderr))
            if x.gradient is not None:
                cells.append(_cell(x.passes * x.gradient.mask, x.passes * x.gradient.mask_stderr))
                cells.append(_cell(x.gradient.data, x.gradient.data_stderr))
            name = x.estimator + ("" if x.unbiased else " (biased)")
            rows.append([str(size), name, _cell(x.loss_mean, x.loss_stderr), *cells])
        rows.append(None)
    title = "variance of the loss and of the gradient (trace), at equal passes"
    head = ("L'", "estimator", "nats per token", "loss, masks", "loss, data", "gradient, masks",
            "data")  # fmt: skip
    return table_text(head, rows, 120, left=1, title=title)


def _cell(value: float, error: float) -> str:
    return f"{value:.3g} ± {error:.1g}"
