"""Which order, settings and block size a model should decode with: quality against speed.

Every point of a grid continues the same beginnings of real text with the same random numbers.

    perplexity   e^(Σ nats / Σ tokens) of the new tokens, given the beginnings, under the judge
    entropy      of the new tokens of a text, in nats, the mean of all: what dull text lacks
    divergence   of their n-grams from those of the real continuations (`evaluation.samples`)
    TPF          new tokens over network evaluations, of all texts
    tokens/s     TPF × evaluations a second, by the median of several timings

Speed is measured with `batch_size` texts at once, all points in turn and in both directions, so
that a machine that slows down slows all of them. The reference is first_hitting, one token an
evaluation, at the model's own block size. What is chosen is the fastest point that is faster than
the reference in every timing, whose perplexity is at most 1 + tolerance times the reference's and
whose entropy is at least 1 − entropy tolerance times its; without one, the reference. The two
ratios are paired by text; their standard errors say how sure that is.
"""

from __future__ import annotations

import json
import math
import random
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from blockdiff.data.tokenizers import bos_id
from blockdiff.errors import InputError, first_line
from blockdiff.evaluation.choosing import Point, Record, decide, own_folder
from blockdiff.evaluation.corpus import documents_of_run, open_to_measure, text_options
from blockdiff.evaluation.judge import Judge, load_judge
from blockdiff.evaluation.options import LISTS, TuneOptions
from blockdiff.evaluation.samples import divergences
from blockdiff.evaluation.score import score_tokens
from blockdiff.folders import claim, clear
from blockdiff.models.denoiser import Conventions, Denoiser
from blockdiff.models.tensors import read_json
from blockdiff.outputs import local_path, to_json, try_writing, write_text
from blockdiff.progress import advance
from blockdiff.registry import ORDERS
from blockdiff.sampling.defaults import ORDERING, store_options, stored_options
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.stopping import token_entropy

REFERENCE = "first_hitting"
WARM_UP = 16  # tokens written before the timing
_DOCUMENTS = 64  # of the corpus for each text wanted, at most

Rows = list[list[int]]
# Beginnings and new tokens of texts → nats and scored tokens of the new part of each, float64 [n].
Judging = Callable[[Rows, Rows], tuple[np.ndarray, np.ndarray]]
Make = Callable[..., SamplingOptions]  # (point, others=…) → all options


def tune(model: str | Path, wish: TuneOptions, device: str | None = None, **opening: Any) -> Record:
    """Measures the grid, chooses, and writes tuning.json; see the module's text.

    The choice is written into the generation_config.json of a local model folder, unless `wish` or
    the place forbids it. `opening`: how `load` opens the model. Returns the record that is in
    tuning.json; its `folder` is where that lies. Raises `InputError` on bad input.
    """
    folder = own_folder(model)
    if folder is None and wish.out is None:
        raise InputError(f"nothing is written into {model}: name a folder for the results as `out`")
    out = local_path("out", f"{folder}/tuning" if wish.out is None else wish.out)
    go_on = not wish.overwrite and (out / "tuning.json").is_file()
    with claim(out, overwrite=wish.overwrite, go_on=go_on, kinds=("tuning",)) as place:
        if folder is not None and wish.write:
            _require_writable(folder)
        network: Any
        network, tokenizer, precision = open_to_measure(
            model, wish, device, few_tokens=True, **opening
        )
        documents, data, part = documents_of_run(model, wish.data, text_options(wish))
        prompts, real = beginnings(documents, tokenizer, network.config.mask_token_id, wish)
        make = partial(_options, _in_force(network), wish)
        points = grid(network.config, wish, make)
        _drop_refused(points, network, prompts[0], wish, make)
        judge, name = _judging(network, tokenizer, wish, device)
        settings: Record = {
            "model": str(model), "data": data, "part": part, "texts": len(prompts),
            "prompt_tokens": wish.prompt_tokens, "max_new_tokens": wish.max_new_tokens,
            "seed": wish.seed, "judge": name, "precision": precision,
            "device": str(network.device), "batch_size": wish.batch_size,
            "repeats": wish.repeats, "in_force": _in_force(network), "reference": points[0],
            "fingerprint": _fingerprint(network, prompts),
        }  # fmt: skip
        if go_on:
            found = _before(place, settings)
        else:
            clear(place, kinds=("tuning",))
            found = []
        record: Record = {"settings": settings, "points": found}
        record["real"] = {"texts": _measured(judge(prompts, real), real)}
        path = place / "tuning.json"
        _measure(network, (prompts, real), points, make, judge, record, path)
        _time(network, prompts, make, record, path)
        decide(record, wish.tolerance, wish.entropy_tolerance)
        written = None
        if folder is not None and wish.write:
            chosen = dict(record["points"][record["chosen"]]["options"])
            if wish.temperatures is None:
                del chosen["temperature"]
            written = store_options(folder, chosen, network.generation_config.to_diff_dict())
        record["written"] = None if written is None else str(written)
        write_text(path, _as_file(record))
    return record | {"folder": str(out)}


def _require_writable(folder: Path) -> None:
    try:
        try_writing(folder)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to: {first_line(error)}; give --no-write"
        ) from None


def beginnings(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, mask: int, wish: TuneOptions
) -> tuple[Rows, Rows]:
    """Beginnings of documents and how they really go on, as ids of both.

    Where there are too few documents, later pieces of them follow; whole pieces come first. Raises
    `InputError` where there are fewer than two.
    """
    texts = list(islice(documents, _DOCUMENTS * wish.samples))
    random.Random(wish.seed).shuffle(texts)
    size, first = wish.prompt_tokens + wish.max_new_tokens, bos_id(tokenizer)
    pieces = []
    for text in texts:
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        for number, at in enumerate(range(0, len(ids) - wish.prompt_tokens, size)):
            piece = ids[at : at + size]
            if mask not in piece:
                pieces.append((len(piece) < size, number, piece))
    pieces.sort(key=lambda one: one[:2])
    if len(pieces) < 2:
        raise InputError(
            f"the text has {len(pieces)} beginnings of {wish.prompt_tokens} tokens that go on; "
            "lower `prompt_tokens`, or give more text as `data`"
        )
    start: list[int] = [] if first is None else [first]
    taken = [(start if number == 0 else [], ids) for _, number, ids in pieces[: wish.samples]]
    return (
        [before + ids[: wish.prompt_tokens] for before, ids in taken],
        [ids[wish.prompt_tokens :] for _, ids in taken],
    )


def grid(config: Conventions, wish: TuneOptions, make: Make) -> list[Point]:
    """The points to try, the reference first.

    Of each order the values that it `tunes`, or those given. Raises `InputError` where an order
    that was asked for cannot do without something.
    """
    temperatures = wish.values("temperatures") or (make({}).temperature,)
    sizes = (1,) if config.causal else wish.values("block_sizes") or config.block_sizes
    own = config.block_size if config.block_size in sizes else max(sizes)
    points: list[Point] = [
        {"sampler": REFERENCE, "block_size": own, "temperature": temperatures[0]}
    ]
    names = wish.order_names or [one for one in ORDERS if _tunes(one) is not None]
    for name, size, temperature in product([REFERENCE, *names], sizes, temperatures):
        for settings in _settings(name, size, wish):
            point = {"sampler": name, **settings, "block_size": size, "temperature": temperature}
            make(point)
            points.append(point)
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _drop_refused(
    points: list[Point], model: Denoiser, prompt: Sequence[int], wish: TuneOptions, make: Make
) -> None:
    """Drops what the model refuses; an `InputError` where it was asked for by name."""
    for point in list(points):
        try:
            Engine(model).admit(prompt, make(point))
        except InputError:
            if point["sampler"] in (REFERENCE, *wish.order_names):
                raise
            points.remove(point)


def _tunes(name: str) -> Mapping[str, Sequence[Any]] | None:
    return getattr(ORDERS[name], "tunes", None)


def _settings(name: str, block_size: int, wish: TuneOptions) -> list[Point]:
    """Settings of an order that make a difference in blocks of that size."""
    reads = ORDERS.words("reads", name)
    if block_size == 1 and name != REFERENCE and "drafts" not in reads:
        return []  # one token is all there is
    axes = dict(_tunes(name) or {})
    needed = {*axes, *ORDERS.words("needs", name)} if axes else {*reads}
    if wish.steps is not None and "tokens_per_step" in axes:
        del axes["tokens_per_step"]
        needed.add("steps")
    for option, setting in LISTS.items():
        if (values := wish.values(option)) and setting in needed:
            axes[setting] = values
    if "tokens_per_step" in axes and wish.tokens_per_step is None:
        axes["tokens_per_step"] = [n for n in axes["tokens_per_step"] if n <= block_size]
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _in_force(model: Any) -> Point:
    """What the model's folder asks for besides an order."""
    found = stored_options(model.generation_config)
    chosen = {*ORDERING, "block_size", "max_new_tokens", "seed", "stop", "logprobs"}
    return {name: value for name, value in found.items() if name not in chosen}


def _options(in_force: Point, wish: TuneOptions, point: Point, **others: Any) -> SamplingOptions:
    told = {"max_new_tokens": wish.max_new_tokens, "seed": wish.seed, "stop": "none"}
    return SamplingOptions(**{**in_force, **told, **others, **point})


def _judging(
    model: Denoiser, tokenizer: PreTrainedTokenizerBase, wish: TuneOptions, device: str | None
) -> tuple[Judging, str]:
    """What judges, and its name."""
    if wish.judge is not None:
        critic = load_judge(wish.judge, wish.window, device)
        return partial(_by_judge, critic, tokenizer), wish.judge
    config = model.config
    if config.causal:
        return partial(_by_itself, model, None, wish.seed), "the model itself"
    if has_single_blocks(config):
        return partial(_by_itself, model, 1, wish.seed), "the model itself, L' = 1"
    what = f"the model's own bound, L' = {config.block_size}"
    return partial(_by_itself, model, None, wish.seed), what


def has_single_blocks(config: Conventions) -> bool:
    """Whether L' = 1, which is AR, is among what the model was trained for."""
    return 1 in config.block_sizes or (
        config.prediction == "shift" and config.clean_stream == "causal"
    )


def _by_itself(
    model: Denoiser, block_size: int | None, seed: int, prompts: Rows, new: Rows
) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that L' = 1 was not trained: predicting the next was
        found = score_tokens(model, prompts, new, seed=seed, greedy=False, block_size=block_size)
    return np.array([one.nats for one in found]), np.array([float(one.tokens) for one in found])


def _by_judge(
    judge: Judge, tokenizer: PreTrainedTokenizerBase, prompts: Rows, new: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """The judge's own tokens of the whole, less those of the beginnings."""

    def decoded(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    whole = [decoded(a + b) for a, b in zip(prompts, new, strict=True)]
    nats, count = judge.nats(whole + [decoded(prompt) for prompt in prompts])
    texts = len(prompts)
    difference = (nats[:texts] - nats[texts:]).numpy()
    return difference, (count[:texts] - count[texts:]).double().numpy()


def _measured(judged: tuple[np.ndarray, np.ndarray], new: Rows) -> Record:
    """What is kept of a set of texts, a figure each."""
    return {
        "nats": judged[0].tolist(),
        "tokens": judged[1].tolist(),
        "entropy": [token_entropy(row) for row in new],
    }


def _fingerprint(model: Denoiser, prompts: Rows) -> str:
    """Changes where the weights or the beginnings do."""
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(p.float()).item() for p in model.parameters()]
    return f"{zlib.crc32(repr(prompts).encode()):08x}-{math.fsum(norms):.5g}"


def _before(place: Path, settings: Record) -> list[Record]:
    """The points that were measured before; `InputError` if it was with other settings."""
    try:
        before = read_json(place / "tuning.json")
        told, points = dict(before["settings"]), list(before["points"])
    except (InputError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{place}/tuning.json is not what tune wrote; measure anew with `overwrite`"
        ) from None
    for name, value in json.loads(to_json(settings)).items():
        if told.get(name) != value:
            raise InputError(
                f"{place} was measured with {name} {told.get(name)!r}, not {value!r}; measure anew "
                "with `overwrite`, or give another `out`"
            )
    return points


def _as_file(record: Record) -> str:
    """A record as JSON, a point a line."""
    points = ",\n".join(to_json(one) for one in record["points"])
    rest = [f"{to_json(name)}: {to_json(value)}" for name, value in record.items()
            if name != "points"]  # fmt: skip
    return ",\n".join(["{" + rest[0], *rest[1:], f'"points": [\n{points}\n]']) + "}\n"


def _measure(
    model: Denoiser,
    texts: tuple[Rows, Rows],
    points: Sequence[Point],
    make: Make,
    judge: Judging,
    record: Record,
    path: Path,
) -> None:
    """Adds the points to those in the record; the file follows each."""
    known = [one["options"] for one in record["points"]]
    missing = [point for point in points if point not in known]
    prompts, real = texts
    with advance(f"Trying {len(missing)} settings", len(missing), "settings") as done:
        for point in missing:
            options = make(point)
            found = generate_tokens(model, prompts, options)
            apart = divergences(found.tokens, real, options.seed)
            record["points"].append({
                "options": point,
                "nfe": sum(found.nfe) / len(found.nfe),
                "tokens_per_nfe": found.tokens_per_nfe,
                "divergence": {str(n): dict(vars(value)) for n, value in apart.items()},
                "texts": _measured(judge(prompts, found.tokens), found.tokens),
            })  # fmt: skip
            write_text(path, _as_file(record))
            done(1)


def _time(model: Denoiser, prompts: Rows, make: Make, record: Record, path: Path) -> None:
    """Adds the seconds of an evaluation to all points, unless all have them."""
    points, settings = record["points"], record["settings"]
    if all("seconds_per_nfe" in one for one in points):
        return
    at_once, repeats = settings["batch_size"], settings["repeats"]
    for one in points:  # in one sitting: a machine is not the same tomorrow
        one["seconds_per_nfe"] = []
        short = make(one["options"], max_new_tokens=min(WARM_UP, settings["max_new_tokens"]))
        generate_tokens(model, prompts[:at_once], short)
    with advance("Timing", repeats * len(points), "turns") as done:
        for turn in range(repeats):
            rows = [(turn * at_once + i) % len(prompts) for i in range(at_once)]
            for one in points[:: -1 if turn % 2 else 1]:
                begun = [prompts[row] for row in rows]
                found = generate_tokens(model, begun, make(one["options"]), rows)
                one["seconds_per_nfe"].append(found.seconds / sum(found.nfe))
                done(1)
    write_text(path, _as_file(record))
