"""Many rows through one engine: as some leave, others are admitted in their place.

    rows wanted   0 1 2 3 4 5 6 …          in the order they are given, read as there is room
    in the engine 1 3 4                    `at_once` of them
    finished      2, which waits for 0 and 1

What comes out is in order, so a row that takes long holds back those that are finished behind it;
at most `AHEAD` times as many as are in the engine, so that memory does not grow with the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.generate import Generation, collect
from blockdiff.sampling.options import SamplingOptions

AHEAD = 8


@dataclass(frozen=True)
class Wanted:
    """A row: the ids of its prompt, how it is sampled, its number in the random numbers' address.

    Example:
        >>> import blockdiff
        >>> from blockdiff.sampling.many import Wanted, write_rows
        >>> model, _ = blockdiff.load("starter")
        >>> options = blockdiff.SamplingOptions(max_new_tokens=2, stop="none")
        >>> rows = (Wanted([first], options) for first in (1, 2, 3))
        >>> [len(one.tokens[0]) for one in write_rows(model, rows, at_once=2)]
        [2, 2, 2]
    """

    prompt: list[int]
    options: SamplingOptions
    number: int = 0


def write_rows(
    model: Denoiser,
    wanted: Iterable[Wanted],
    at_once: int,
    between: Callable[[int, int], None] | None = None,
) -> Iterator[Generation]:
    """Each row's `Generation` (of one row, its seconds 0), in the order of `wanted`.

    `at_once`: rows in the engine. `between` is called after each evaluation with how many tokens it
    fixed, and how many rows took part. In float32 a row's tokens and evaluations depend on the row
    alone, as far as docs/precision.md has it. Raises `InputError` as `Engine.admit` does.
    """
    engine, source = Engine(model), enumerate(wanted)
    running: dict[int, tuple[int, Wanted]] = {}  # name in the engine → place in the order
    finished: dict[int, Generation] = {}
    admitted = given = 0
    more = True
    was_training = model.training
    model.eval()
    try:
        while more or running:
            # A prompt's evaluation stops all other rows: a few are admitted together.
            free = at_once - len(running)
            while more and free and (8 * free >= at_once or not running):
                if len(running) == at_once or admitted - given >= AHEAD * at_once:
                    break
                place, row = next(source, (-1, None))
                if row is None:
                    more = False
                    break
                running[engine.admit(row.prompt, row.options, row.number)] = place, row
                admitted += 1
            if running:
                step = engine.step()
                if between is not None:
                    between(int(step.fixed.sum()), len(running))
                for at in step.done.nonzero()[:, 0].tolist():
                    name = int(step.rows[at])
                    place, row = running.pop(name)
                    finished[place] = collect(
                        step.of(step.rows == name), [row.prompt], model.config.eos_token_id,
                        row.options.max_new_tokens, 0.0,
                    )  # fmt: skip
                    engine.drop(name)
            while given in finished:
                yield finished.pop(given)
                given += 1
    finally:
        model.train(was_training)
