"""`blockdiff evaluate-samples`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from blockdiff import checks
from blockdiff.commands.options import Command, Given, JsonOption, print_record
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision, SampleOptions
from blockdiff.outputs import new_file
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class FrontierOptions:
    """Texts of a model at several temperatures.

    Attributes:
        temperatures: With commas, for example 0.7,0.8,0.9,1: `samples` names a model then, whose
            texts are measured at each, and perplexity stands against entropy.
        number: Texts written at each temperature.
        precision: Weights of the model: float32, bf16, int8, or auto (bf16 where the processor is
            made for it).
        plot: PNG of perplexity against entropy.
    """

    temperatures: str | None = None
    number: int = 100
    precision: Precision = "auto"
    plot: str | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers that cannot be meant."""
        checks.options(self, {"number": (1, checks.LARGEST_TEXT)}, {})
        _ = self.values

    @property
    def values(self) -> list[float]:
        """The temperatures, from the coldest."""
        if self.temperatures is None:
            return []
        found = checks.real_numbers("temperatures", self.temperatures)
        for value in found:
            checks.numbers(temperature=value)
        return sorted(found)


# What says how a model writes; without temperatures nothing is written.
_WRITING = {f.name for kind in (FrontierOptions, SamplingOptions) for f in fields(kind)} - {"seed"}


def _run(given: Given) -> None:
    wish, frontier = given.make(SampleOptions), given.make(FrontierOptions)
    if frontier.temperatures is None:
        for name in sorted(_WRITING & given.named):
            raise InputError(
                f"`{name}` says how a model writes: give `temperatures` and a model too"
            )
        from blockdiff.evaluation.samples import measure_samples, quality_table

        found = measure_samples(wish)
    else:
        if "temperature" in given.named:
            raise InputError("`temperature` is one of several: leave it out, or `temperatures`")
        options = given.make(SamplingOptions)
        picture = None if frontier.plot is None else new_file("plot", frontier.plot)
        found = _frontier(wish, frontier, options, picture)
        from blockdiff.evaluation.samples import quality_table
    records = {name: quality.record() for name, quality in found.items()}
    print_record(given, records, lambda _: quality_table(found))


def _frontier(
    wish: SampleOptions, frontier: FrontierOptions, options: SamplingOptions, picture: Path | None
) -> dict:
    from blockdiff.api import load
    from blockdiff.device import choose_device
    from blockdiff.evaluation.frontier import measure_frontier
    from blockdiff.models.weights import convert
    from blockdiff.plots import temperature_plot

    model, words = load(wish.samples, device=choose_device(wish.device))
    convert(model, frontier.precision, model.device, few_tokens=True)
    found = measure_frontier(model, words, wish, options, frontier.values, frontier.number)
    if picture is not None:
        records = {name: quality.record() for name, quality in found.items()}
        title = f"{wish.samples}, {frontier.number} texts each, read by {wish.judge}"
        temperature_plot(records, picture, title=title)
    return found


COMMAND = Command(
    summary="Measure generated texts: perplexity under a judge, entropy, diversity.",
    kinds=(SampleOptions, FrontierOptions, JsonOption, SamplingOptions),
    run=_run,
    places=("samples",),
    sections={
        "samples": "Samples and judge",
        "reference": "Real text",
        "seed": "Other",
        "temperatures": "Temperatures",
        "json": "Output",
        "max_new_tokens": "Sampling, with --temperatures",
    },
    examples=(
        "blockdiff evaluate-samples samples.json --judge gpt2-large --reference pydoc --mauve",
        "blockdiff evaluate-samples samples.json --judge runs/ar --json",
        "blockdiff evaluate-samples runs/bd3lm --judge runs/ar --temperatures 0.7,0.8,0.9,1 "
        "--plot frontier.png",
    ),
)
