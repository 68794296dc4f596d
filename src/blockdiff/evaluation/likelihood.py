"""How likely a model finds a text, with error bars.

AR gives its exact negative log-likelihood; block diffusion an upper bound on it (eq. 8 of the
paper), exact by `enumerate` for small blocks and by unbiased draws otherwise. Biased draws
(`clipped`) bound nothing and are refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from blockdiff import checks
from blockdiff.categorical import uniform
from blockdiff.errors import InputError
from blockdiff.estimators import Estimator, MakeDraw, make_estimator
from blockdiff.evaluation.statistics import ratio_error
from blockdiff.laws import objective_of
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import Noise
from blockdiff.registry import ESTIMATORS, SCHEDULES, Choices, name_of
from blockdiff.schedules import Schedule

# Enumerated by default up to here: 15 noised passes.
AUTO_ENUMERATE = 4
# Tokens in one network evaluation: enough to fill the machine, fewer where memory is short.
TOKENS_PER_PASS = 16_384

_BIASED = "{} draws are biased and bound no likelihood; measure with exact_k or enumerate"


def perplexity_of(nats: float) -> float:
    """e^nats, infinite past what a float holds (709.78 nats)."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


@dataclass(frozen=True)
class Likelihood:
    """A measured likelihood; all in nats unless named otherwise.

    `nats` [B] float64: the bound (for AR the exact value) of each sequence, averaged over draws.
    `tokens` [B]: how many tokens of each sequence count. `nats_per_token`: total over total.
    `errors` [B] float64: what `mask_stderr` is for each sequence alone, in nats.
    `stderr`: its standard error over sequences, with the noise of the text and of the masks in it;
    NaN for a single sequence. `mask_stderr`: the part due to the masks alone, 0 where there is none
    (`exact`) and NaN with a single draw. It comes from the spread of independent groups of draws
    (see `independent_groups`), an unbiased estimate of the variance with one degree of freedom per
    sequence: with a handful of sequences it is itself uncertain. Under `bernoulli` and `d3pm`,
    whose rare masks weigh most, ± 1.96 errors held the bound in 91 of 100 runs
    (benchmarks/coverage.py).

    Example:
        >>> import torch, blockdiff
        >>> found = blockdiff.Likelihood(torch.tensor([6.0]), torch.tensor([3]), 2.0, float("nan"),
        ...                              0.0, "enumerate", 1, True)
        >>> round(found.perplexity, 3)  # e²
        7.389
    """

    nats: Tensor
    tokens: Tensor
    nats_per_token: float
    stderr: float
    mask_stderr: float
    estimator: str
    draws: int
    exact: bool
    errors: Tensor | None = None

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.nats_per_token)

    @property
    def perplexity_stderr(self) -> float:
        """By the delta method: perplexity · stderr; NaN where the perplexity is infinite."""
        return self.perplexity * self.stderr if math.isfinite(self.perplexity) else math.nan

    def record(self) -> dict[str, object]:
        """Everything but the per-sequence tensors, for JSON."""
        fields = {k: v for k, v in vars(self).items() if not isinstance(v, Tensor | None)}
        return {
            **fields,
            "bits_per_token": self.bits_per_token,
            "perplexity": self.perplexity,
            "perplexity_stderr": self.perplexity_stderr,
            "sequences": len(self.nats),
            "counted_tokens": int(self.tokens.sum()),
        }


@torch.no_grad()
def likelihood(
    model: Denoiser,
    x_0: Tensor,
    estimator: str | Estimator = "auto",
    draws: int = 8,
    seed: int = 0,
    *,
    block_size: int | None = None,
    schedule: str | Schedule = "linear",
    timesteps: int = 1000,
    keep_first: bool | None = None,
    documents: Tensor | None = None,
    maskable: Tensor | None = None,
    rows: Tensor | None = None,
    batch_size: int | None = None,
    budget: int | None = None,
    progress: Callable[[int], None] | None = None,
    processes: PartialState | None = None,
) -> Likelihood:
    """Measures sequences x_0 int64 [B, L], on any device, under the model.

    `estimator`: "auto" (`enumerate` up to L' = 4, else `exact_k`), or one that is unbiased, by its
    name or as an object, with the `schedule` and `timesteps` it may read; AR models ignore it.
    `draws` noised copies per sequence (pairs for `paired`); every draw of a sequence shares one
    pass over its clean tokens. The noise depends on `seed` and the sequence's number only, never on
    the batching; `rows` int64 [B] are these numbers, 0, 1, … when left out.

    `maskable` bool [B, L]: the tokens that count; the others are given and stay clean, so that what
    is measured is −log p(tokens that count | those given before or among them). Whatever it says,
    padding does not count, nor does position 0 under `keep_first`, the model's own by default.

    `budget`: tokens in one network evaluation, by default as many as free memory suggests; the last
    digits depend on it. `progress` is called with the number of sequences done. `processes` share
    the sequences, and each gets the result of all. Raises `InputError` for biased draws, sizes
    below 1, or tokens outside the vocabulary.

    Example:
        >>> import torch, blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> x_0 = torch.tensor([tokenizer.encode("The function returns a new list.")[:4]])
        >>> found = blockdiff.likelihood(model, x_0)
        >>> found.estimator, found.exact, found.perplexity > 1
        ('enumerate', True, True)
    """
    SCHEDULES.find(schedule)
    checks.numbers(
        draws=draws, seed=seed, timesteps=timesteps, batch_size=batch_size, budget=budget
    )
    check_estimator(estimator)
    _check(model, x_0)
    x_0 = x_0.to(model.device)
    documents = None if documents is None else documents.to(model.device)
    length = x_0.shape[1]
    layout = model.config.layout_of(length, model.config.choose_block_size(block_size, length))
    if keep_first is None or layout.prediction == "shift":  # which predicts no token 0
        keep_first = model.config.keep_first
    objective = objective_of(model.config)
    counted = objective.counted(x_0, keep_first, documents)
    if maskable is not None:
        if maskable.shape != x_0.shape or maskable.dtype != torch.bool:
            raise InputError(f"maskable must be bool {list(x_0.shape)}, as x_0 is")
        counted &= maskable.to(x_0.device)
    if estimator == "auto":
        small = layout.block_size <= AUTO_ENUMERATE and not model.config.time_conditioning
        estimator = "enumerate" if small else "exact_k"
    name = name_of(estimator) if objective.noised else "ar"
    random = objective.noised and ESTIMATORS.find(estimator).random
    if objective.noised and not random and model.config.time_conditioning:
        raise InputError(
            f"{name} leaves no time to condition on, and this model is conditioned on it: "
            "use exact_k"
        )
    if not random:
        draws = 1
    tokens = tokens_per_pass(model) if budget is None else budget
    at_once = max(1, tokens // (2 * x_0.shape[1])) if batch_size is None else batch_size
    numbers = torch.arange(len(x_0), device=x_0.device) if rows is None else rows.to(x_0.device)
    was_training = model.training
    model.eval()
    per_draw = []
    mine = torch.arange(len(x_0), device=x_0.device)
    if processes is not None:
        mine = mine[processes.process_index :: processes.num_processes]
    for index in mine.split(at_once) if len(mine) else ():
        part = layout if documents is None else replace(layout, documents=documents[index])
        if not objective.noised:
            nats = objective.measure(model, x_0[index], counted[index], part)
            nats = nats.cpu().double().sum(-1)[None]
        else:
            nats = _bound(
                model, x_0[index], numbers[index], counted[index], part,
                bound=objective.measure,
                make=make_estimator(estimator, schedule, timesteps=timesteps),
                name=name, random=random, draws=draws, seed=seed, budget=tokens,
            )  # fmt: skip
        per_draw.append(nats)
        if progress is not None:
            progress(len(index))
    model.train(was_training)
    if processes is not None and processes.num_processes > 1:
        found = gather_object([(mine.cpu(), per_draw)])
        order = torch.cat([index for index, _ in found]).argsort()
        per_draw = [torch.cat([nats for _, parts in found for nats in parts], dim=1)[:, order]]
    return _summary(torch.cat(per_draw, dim=1), counted.sum(-1).cpu(), name, not random)


def check_estimator(estimator: str | Estimator) -> None:
    """Raises `InputError` unless it is one whose draws bound the likelihood, or auto."""
    checks.one_of("estimator", estimator, Choices(ESTIMATORS, also=("auto",)))
    if estimator != "auto" and not ESTIMATORS.find(estimator).unbiased:
        raise InputError(_BIASED.format(name_of(estimator)))


def tokens_per_pass(model: Denoiser) -> int:
    """`TOKENS_PER_PASS`, or as many as a quarter of the free memory holds."""
    config, device = model.config, model.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    # Keys and values of every layer, and one layer's own tensors: about 40 of its width.
    bytes_per_token = 4 * config.hidden_size * (2 * config.num_hidden_layers + 40)
    return min(TOKENS_PER_PASS, free // 4 // bytes_per_token)


def _check(model: Denoiser, x_0: Tensor) -> None:
    if not isinstance(x_0, Tensor) or x_0.dtype != torch.int64:
        kind = x_0.dtype if isinstance(x_0, Tensor) else type(x_0).__name__
        raise InputError(f"x_0 must be a [B, L] tensor of token ids, int64, not {kind}")
    if x_0.dim() != 2 or x_0.numel() == 0:
        raise InputError(
            f"x_0 must be a non-empty [B, L] tensor of token ids, not {list(x_0.shape)}"
        )
    low, high = int(x_0.min()), int(x_0.max())
    if low < 0 or high >= model.config.vocab_size:
        raise InputError(
            f"token ids run from {low} to {high}, outside the model's vocabulary of "
            f"{model.config.vocab_size}; is this the model's tokenizer?"
        )


def _bound(
    model: Denoiser,
    x_0: Tensor,
    numbers: Tensor,
    maskable: Tensor,
    layout: BlockLayout,
    *,
    bound: Callable[..., Tensor],
    make: MakeDraw,
    name: str,
    random: bool,
    draws: int,
    seed: int,
    budget: int,
) -> Tensor:
    """The bound by each of R draws, in nats, float64 [R, B]; R = 1 where nothing is random."""
    context = model.encode(x_0, layout) if layout.blocks > 1 else None
    noises: list[Noise | None] = [None]
    if random:
        of_all = addressed_noise(numbers, layout, seed, draws)
        noises = [of_all.rows(r * len(x_0), (r + 1) * len(x_0)) for r in range(draws)]
    copies = max(1, budget // (2 * x_0.numel()))  # of each sequence, in one pass
    nats = []
    for noise in noises:
        draw = make(x_0, layout, noise, maskable, model.config.mask_token_id)
        if not draw.unbiased:
            raise InputError(_BIASED.format(name))
        # `paired` and `enumerate` make several copies of each sequence, whose terms are summed.
        total = torch.zeros(len(x_0), dtype=torch.float64)
        for part in draw.split(copies * len(x_0)):
            tokens = bound(model, x_0, part, layout, context)
            total += tokens.cpu().double().sum(-1)
        nats.append(total)
    return torch.stack(nats)


def independent_groups(draws: int) -> int:
    """How many equal groups the draws of a sequence are in; each group is stratified on its own.

    The error of the draws' mean is read off the spread of the groups, which are independent.
    Stratified draws are not: their own spread overstates it. The groups are two, or the fewest
    that divide the draws, since a larger group has less noise.
    """
    return next((n for n in range(2, draws + 1) if draws % n == 0), 1)


def addressed_noise(numbers: Tensor, layout: BlockLayout, seed: int, draws: int = 1) -> Noise:
    """Noise that depends on the seed and a sequence's number only, for reproducible evaluation.

    `numbers` int64 [B]: each sequence's in the corpus. Stratified over the blocks of a sequence and
    the draws of a group (see `independent_groups`), but never across sequences: what a sequence is
    batched with does not change its noise.
    """
    device, groups = numbers.device, independent_groups(draws)
    cells = draws // groups * layout.blocks
    cell_index = torch.arange(groups * cells, device=device).view(groups, cells)
    order = uniform(seed, 0, numbers[:, None, None], cell_index).argsort(-1)
    block = (order + uniform(seed, 1, numbers[:, None, None], cell_index)) / cells  # [B, G, R/G·N]
    block = block.view(len(numbers), draws, layout.blocks).transpose(0, 1).flatten(0, 1)
    draw = torch.arange(draws, device=device)[:, None, None]
    position = torch.arange(layout.length, device=device)
    token = uniform(seed, 2, numbers[None, :, None], draw, position).flatten(0, 1)
    return Noise(block, token)


def _summary(per_draw: Tensor, tokens: Tensor, estimator: str, exact: bool) -> Likelihood:
    """The result of per-sequence totals [R, B] and counts of tokens [B]."""
    draws, nats = len(per_draw), per_draw.mean(0)
    variances = torch.full_like(nats, 0.0 if exact else math.nan)
    if not exact and draws > 1:
        groups = per_draw.unflatten(0, (independent_groups(draws), -1)).mean(1)
        variances = groups.var(0) / len(groups)
    return summed_up(nats, variances.sqrt(), tokens, estimator, draws, exact)


def summed_up(
    nats: Tensor, errors: Tensor, tokens: Tensor, estimator: str, draws: int, exact: bool
) -> Likelihood:
    """The result of sequences that were measured, together or apart.

    `nats`, `errors` float64 [B], `tokens` [B] and the others as in `Likelihood`. Raises
    `InputError` where no token counts.
    """
    total = tokens.sum().item()
    if total == 0:
        raise InputError("nothing to measure: no token of these sequences counts")
    rate = nats.sum().item() / total
    stderr = ratio_error(nats.numpy(), tokens.numpy())
    mask_stderr = math.sqrt((errors**2).sum().item()) / total
    return Likelihood(nats, tokens, rate, stderr, mask_stderr, estimator, draws, exact, errors)
