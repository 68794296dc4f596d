"""What the miniature reproduction runs: a list of jobs, each with the jobs it needs.

Every model is trained from scratch on the same number of tokens, at every seed. Beside that the
paper's way, a base of one whole block (MDLM) that is fine-tuned at each block size, and the same
from an AR base, where the estimators are compared; the base's tokens count. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from blockdiff.training.config import Preset

# Block sizes of the paper; the context is the fifth, MDLM's.
BLOCK_SIZES = (1, 4, 8, 16)
# Where estimators and initialisations are compared.
COMPARED = (4, 16)
# The paper's clips for L' = 4 and for L' = 16, and the one that is searched for.
CLIPS = {"clip-high": "0.45,0.95", "clip-middle": "0.3,0.8", "clip-auto": "auto"}
# How much longer the two runs are that show whether L' = 1 goes on towards AR.
LONGER = 2
# Whose texts are also written at lower temperatures, at one token a step, and which.
FRONTIER = ("ar", "L4", "mdlm")
COLDER = (0.5, 0.7, 0.85)


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    `steps` of `batch_size` windows for every model, `fine_share` of them after a base; `seeds`: how
    many; some comparisons are run with the first only. Variances are measured on
    `variance` = (batches, windows a batch, draws). Texts are cut into passages of so many
    `sentences`, so that they end within reach of the context, as the paper's web pages do.
    `samples` texts are generated at a time, of `long_tokens` where length is open.
    """

    steps: int = 1600
    fine_share: float = 0.35
    seeds: int = 2
    batch_size: int = 16
    length: int = 128
    vocab_size: int = 1024
    preset: Preset = "nano"
    lr: float = 3e-3
    warmup: int = 100
    initial_shift: float = 1.0
    ema: float = 0.998
    test_fraction: float = 0.1
    test_windows: int = 768
    draws: int = 4
    searches: int = 6
    variance: tuple[int, int, int] = (6, 8, 12)
    save_every: int = 200
    sentences: int = 2
    samples: int = 64
    long_tokens: int = 512

    @property
    def fine_steps(self) -> int:
        return max(1, round(self.steps * self.fine_share))

    @property
    def base_steps(self) -> int:
        return self.steps - self.fine_steps


SMOKE = Scale(
    steps=4, seeds=2, batch_size=2, length=32, vocab_size=300, warmup=2, test_windows=4, draws=2,
    searches=1, variance=(2, 2, 2), save_every=100,
    samples=4, long_tokens=48,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One piece of work; `cost` in arbitrary units orders and shows what is left."""

    name: str
    kind: str
    after: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0

    def record(self) -> dict[str, Any]:
        return asdict(self)


def plan(scale: Scale) -> list[Job]:
    """Every job, each after those it needs."""
    jobs: list[Job] = []
    for seed in range(scale.seeds):
        jobs += _trainings(scale, seed)
    trained = [job for job in jobs if not job.name.endswith("-base")]
    jobs += [
        Job(f"{job.name}/likelihood", "likelihood", (job.name,), {"model": job.name}, 200.0)
        for job in trained
    ]
    for size in sizes(scale):
        model = "s0-mdlm" if size == scale.length else f"s0-L{size}"
        settings = {"model": model, "block_size": size}
        jobs.append(Job(f"variance-L{size}", "variance", (model,), settings, 900.0))
    return jobs + _samplings(scale)


def _samplings(scale: Scale) -> list[Job]:
    """Texts of the context's length at several NFE, longer ones, and ones that end by themselves.

    The judge is an AR model of another seed than the one that is judged.
    """
    judge = f"s{scale.seeds - 1}-ar"
    whole = scale.length - 1  # after the beginning-of-text token
    jobs = [Job("samples-real", "real", (judge,), {"judge": judge, "tokens": whole}, 30.0)]

    def add(name: str, model: str, cost: float, **options: Any) -> None:
        options = {"max_new_tokens": whole, "stop": "none"} | options
        settings = {"judge": judge, "model": f"s0-{model}", "options": options}
        jobs.append(Job(f"samples-{name}", "samples", (f"s0-{model}", judge), settings, cost))

    for model in ("ar", "L1", "L4", "L8", "L16", "mdlm"):
        cost = 400.0 if model == "mdlm" else 60.0
        add(f"{model}-all", model, cost)
        if model not in ("L1", "L8"):
            add(f"{model}-long", model, 4 * cost, max_new_tokens=scale.long_tokens)
            add(f"{model}-end", model, 4 * cost, max_new_tokens=scale.long_tokens, stop="eos")
    for model in FRONTIER:
        for temperature in COLDER:
            add(f"{model}-at-{temperature:g}", model, 60.0, temperature=temperature)
    for model, steps in (("L4", (1, 2)), ("L8", (1, 2, 4)), ("L16", (1, 2, 4, 8)),
                         ("mdlm", (8, 16, 32, 64)), ("sedd", (8, 16, 32, 64, 128))):  # fmt: skip
        for count in steps:
            sampler = "analytic" if model == "sedd" else "ancestral"
            cost = 3.0 * count if model in ("mdlm", "sedd") else 60.0
            add(f"{model}-T{count}", model, cost, sampler=sampler, steps=count)
    add("sedd-end", "sedd", 400.0, sampler="analytic", steps=scale.length, stop="eos")
    return jobs


def sizes(scale: Scale) -> list[int]:
    """Every block size, the whole context last."""
    return [*BLOCK_SIZES, scale.length]


def clips(size: int, seed: int = 0) -> list[str]:
    """The clips compared at a block size; other seeds than the first repeat one of them."""
    if seed:
        return ["clip-high"]
    return [name for name in CLIPS if name != "clip-middle" or size > 4]


def _trainings(scale: Scale, seed: int) -> list[Job]:
    base, fine, whole = scale.base_steps, scale.fine_steps, scale.steps
    jobs: list[Job] = []

    def add(name: str, steps: int, cost: float, after: str = "", **settings: Any) -> None:
        needs = (f"s{seed}-{after}",) if after else ()
        jobs.append(
            Job(
                f"s{seed}-{name}", "train", needs,
                {"seed": seed, "steps": steps, "warmup": min(scale.warmup, steps // 3)} | settings,
                cost * steps,
            )
        )  # fmt: skip

    def fine_tuned(name: str, size: int, start: str, **settings: Any) -> None:
        add(name, fine, 1.25, start, init_from=f"s{seed}-{start}", block_size=size, **settings)

    def go_on(name: str, start: str, before: int, total: int, cost: float) -> None:
        add(name, total - before, cost, start, continues=f"s{seed}-{start}", total=total)

    scratch: dict[str, Any] = {"initial_shift": scale.initial_shift}
    add("mdlm-base", base, 1.0, objective="mdlm", **scratch)
    add("ar-base", base, 0.65, objective="ar")
    # The paper's control at L' = 1 and what it stands beside, the linear schedule.
    add("ar-half", whole, 0.6, objective="ar", half_counted=True)
    add("L1-linear", whole, 1.1, block_size=1, estimator="bernoulli", **scratch)
    go_on("mdlm", "mdlm-base", base, whole, 1.0)
    go_on("ar", "ar-base", base, whole, 0.65)
    for size in BLOCK_SIZES:
        add(f"L{size}", whole, 1.25, block_size=size, **scratch)
    fine_tuned("L1-from-ar", 1, "ar-base")
    for size in COMPARED:
        fine_tuned(f"L{size}-from-mdlm", size, "mdlm-base")
        fine_tuned(f"L{size}-from-ar", size, "ar-base")
        fine_tuned(f"L{size}-bernoulli", size, "ar-base", estimator="bernoulli")
        for name in clips(size, seed):
            fine_tuned(f"L{size}-{name}", size, "ar-base", estimator="clipped", clip=CLIPS[name])
    if seed == 0:
        fine_tuned("L1-bernoulli", 1, "ar-base", estimator="bernoulli")
        add("sedd", whole, 1.1, objective="sedd", **scratch)
        go_on("ar-longer", "ar", whole, LONGER * whole, 0.65)
        go_on("L1-longer", "L1", whole, LONGER * whole, 1.25)
    return jobs
