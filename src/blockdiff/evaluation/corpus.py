"""The likelihood of a whole corpus: text in, one record out."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockdiff import checks
from blockdiff.data.conversations import pack_conversations
from blockdiff.data.corpora import load_corpus, split_documents
from blockdiff.data.detokenizers import detokenized
from blockdiff.data.mixture import chained
from blockdiff.data.packing import Windows, pack
from blockdiff.data.windows import stack
from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import Likelihood, likelihood, summed_up, tokens_per_pass
from blockdiff.evaluation.options import CorpusOptions, EvaluateOptions, Opening
from blockdiff.jobs import Job, open_job
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import load_in
from blockdiff.models.weights import fingerprint
from blockdiff.printing import names_of, table_text
from blockdiff.progress import advance
from blockdiff.starter import packaged
from blockdiff.training.stored import held_out

Texts = str | Sequence[str]
PARTS = ("all", "train", "validation")
LONGEST_WINDOW = 1024  # unless a length is asked for: contexts of adapted models are far longer
PACKING = ("bos", "eos", "across_documents", "window_marks")
# How a text is opened and packed where neither the caller nor the model's own run says.
DEFAULTS: dict[str, Any] = {
    "part": "all", "validation_fraction": 0.05, "split_seed": 0, "text_column": "text",
    "split": "train", "subset": None, "detokenizer": "none", "bos": False, "eos": True,
    "across_documents": True, "window_marks": False, "apart": False,
    "format": "text",
}  # fmt: skip


def options_of_run(
    model: str | Path, data: Texts, given: dict[str, Any]
) -> tuple[Texts, dict[str, Any], str]:
    """(the text to open, every option of `DEFAULTS`, the part that is measured) for `data`.

    Of the text the run in the model's folder was trained on, what is None in `given` is what that
    run did: the part it held out, by its seed and fraction or from its own validation text, its
    column, subset, marks undone and packing. Of any other text it is `DEFAULTS`. Raises
    `InputError` when the run's record is damaged, or for no such part.
    """
    told = {name: value for name, value in given.items() if value is not None}
    checks.one_of("part", told.get("part", "all"), PARTS)
    run = held_out(packaged(model)) or {}
    mixed = run.get("data_weights") is not None
    trained = _same(data, run.get("data"))
    trained |= mixed and any(_same(data, one) for one in run["data"])
    settings = {**DEFAULTS, "apart": mixed}
    if not trained and not _same(data, run.get("validation_data")):
        settings |= told
        return data, settings, settings["part"]
    settings |= {name: run[name] for name in ("format", "text_column", "detokenizer", *PACKING)}
    split = run["validation_split"] or "train"
    if not trained:
        settings |= {"split": split} | told
        return data, settings, settings["part"]
    settings |= {"split": run["split"], "subset": run["subset"], "part": "validation"}
    settings |= {"validation_fraction": run["validation_fraction"], "split_seed": run["seed"]}
    settings |= told
    part = settings["part"]
    cut_anew = not told.keys().isdisjoint(("validation_fraction", "split_seed", "split", "subset"))
    if cut_anew or (run["validation_data"] is None and run["validation_split"] is None):
        return data, settings, part
    # The run validated on a text of its own and trained on all of this one.
    settings["part"] = "all"
    if part == "validation":
        settings["split"] = split
        if run["validation_data"] not in (None, run["data"]):
            data, settings["subset"] = run["validation_data"], None
    return data, settings, part


def text_options(wish: CorpusOptions) -> dict[str, Any]:
    """What was said of the options of `DEFAULTS`; None for the others."""
    return {name: getattr(wish, name, None) for name in DEFAULTS}


def documents_of_run(
    model: str | Path, data: Texts, given: dict[str, Any]
) -> tuple[Iterable[str], Texts, str]:
    """(the documents, the text they are of, the part of it), read as `options_of_run` says.

    Raises `InputError` as that does, and for a text of conversations.
    """
    data, settings, part = options_of_run(model, data, given)
    if settings["format"] != "text":
        raise InputError(f"{data} holds conversations; name a plain text as `data`")
    reading = {name: value for name, value in settings.items() if name not in PACKING}
    return open_documents(data, **reading), data, part


def _same(data: Texts, other: Texts | None) -> bool:
    """Whether two names are of the same text."""
    if not (isinstance(data, str) and isinstance(other, str)) or data == other:
        return data == other
    paths = [Path(name).expanduser() for name in (data, other)]
    try:
        return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
    except OSError:  # a name too long for a path, for example
        return False


def open_documents(
    data: str | Sequence[str],
    *,
    part: str = "all",
    validation_fraction: float = 0.05,
    split_seed: int = 0,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    detokenizer: str = "none",
    apart: bool = False,
    format: str = "text",
) -> Iterable[str]:
    """The documents of a corpus, or of the part of it that training saw or held out.

    `apart`: several texts are split each on its own, as a mixture's are.
    """
    checks.one_of("part", part, PARTS)
    checks.numbers(validation_fraction=validation_fraction, split_seed=split_seed)
    if apart and not isinstance(data, str):
        each: dict[str, Any] = {
            "part": part, "validation_fraction": validation_fraction, "split_seed": split_seed,
            "text_column": text_column, "split": split, "subset": subset,
            "detokenizer": detokenizer, "format": format,
        }  # fmt: skip
        return chained(", ".join(data), [open_documents(one, **each) for one in data])
    documents = detokenized(
        load_corpus(data, split=split, text_column=text_column, subset=subset, format=format),
        detokenizer,
    )
    if part == "all":
        return documents
    whole = format != "text"
    train, held_out = split_documents(documents, validation_fraction, split_seed, whole=whole)
    return train if part == "train" else held_out


def open_sequences(
    network: Denoiser,
    words: PreTrainedTokenizerBase,
    data: Texts,
    *,
    length: int | None = None,
    windows: int = 0,
    part: str = "all",
    block_sizes: Sequence[int] = (),
    **options: Any,
) -> tuple[Windows, dict[str, Tensor]]:
    """A packed corpus and `windows` of it, evenly spread, 0 for all: see `pack_documents`.

    `options`: of `open_documents` and of `pack`.
    """
    packing = {name: options.pop(name) for name in PACKING if name in options}
    packing |= {"format": options.get("format", "text"), "block_sizes": block_sizes}
    documents = open_documents(data, part=part, **options)
    name = "the corpus" if part == "all" else f"its {part} part"
    return pack_documents(
        network, words, documents, length=length, windows=windows, name=name, **packing
    )


def packed_length(network: Denoiser, length: int | None) -> int:
    """Tokens of a window: what was asked for, or the network's context up to 1,024."""
    return min(network.config.length, LONGEST_WINDOW) if length is None else length


def pack_documents(
    network: Denoiser,
    words: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    length: int | None = None,
    windows: int = 0,
    name: str = "the corpus",
    format: str = "text",
    block_sizes: Sequence[int] = (),
    **packing: Any,
) -> tuple[Windows, dict[str, Tensor]]:
    """Documents packed into windows, and so many of these.

    The sequences are x_0 int64 [B, L], documents [B, L] where windows are padded, and of
    conversations maskable [B, L], on the network's device. `name`: what messages call the
    documents; `format`: what they are; `block_sizes`: those they are measured with, beside the
    network's own; `packing`: options of `pack`.
    """
    checks.numbers(windows=windows, length=length)
    length = packed_length(network, length)
    if format == "text":
        packed = pack(documents, words, length=length, progress=True, name=name, **packing)
    else:
        packed = pack_conversations(
            documents, words, format=format, length=length, progress=True, name=name,
            block=lcm(*network.config.block_sizes, *block_sizes),
            prompt_grid=network.config.prompt_grid,
        )  # fmt: skip
    return packed, {name: x.to(network.device) for name, x in stack(packed, windows).items()}


def evaluate_corpus(
    model: str | Path,
    wish: EvaluateOptions,
    device: str | None = None,
    *,
    job: Job | None = None,
    **opening: Any,
) -> dict[str, object]:
    """Measures a corpus under the model in a folder or hub repository.

    What is None is the run's own where `data` is what the model in that folder was trained on
    (then `part` is what it held out), else as in `DEFAULTS`. `job`: where each sequence's figures
    go; opened here where `wish` names a file. `opening`: how `load` opens the model.
    Returns `measure_sequences`'s record.
    Raises `InputError` on bad input.
    """
    if wish.out is not None and job is None:
        with open_job(wish.out, overwrite=wish.overwrite) as opened:
            return evaluate_corpus(model, wish, device, job=opened, **opening)
    source, corpus, measured = options_of_run(model, wish.data, text_options(wish))
    network, words, precision = open_to_measure(model, wish, device, **opening)
    if job is not None:
        job.told["precision"] = precision
    packed, sequences = open_sequences(
        network, words, source, length=wish.length, windows=wish.windows,
        block_sizes=[wish.block_size] if wish.block_size is not None else [], **corpus,
    )  # fmt: skip
    record = measure_sequences(
        network, packed, sequences, model=str(model), data=source, block_size=wish.block_size,
        estimator=wish.estimator, draws=wish.draws, timesteps=wish.timesteps,
        batch_size=wish.batch_size, seed=wish.seed, job=job,
    )  # fmt: skip
    return {**record, "part": measured, "precision": precision}


def open_to_measure(
    model: str | Path,
    wish: Opening,
    device: str | None,
    *,
    few_tokens: bool = False,
    **opening: Any,
) -> tuple[Denoiser, PreTrainedTokenizerBase, str]:
    """(model, tokenizer, what `precision` became), its weights in that precision.

    `few_tokens`: as `convert` has it, for a model that writes.
    """
    opening |= {"tokenizer": wish.tokenizer, "few_tokens": few_tokens}
    return load_in(model, wish.precision, device, **opening)


def measure_sequences(
    network: Denoiser,
    packed: Windows,
    sequences: dict[str, Tensor],
    *,
    model: str,
    data: Texts,
    block_size: int | None = None,
    job: Job | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measures what `open_sequences` gave; `model` and `data` name the two in the record.

    `options` are those of `likelihood`; `job`: where each sequence's figures go, and come from
    where it has them. Returns `Likelihood.record()` with the model, the data and
    the same figures per UTF-8 byte: nats per token times tokens per byte of the whole corpus.
    """
    with advance(f"{network.config.kind} on {data}", len(sequences["x_0"]), "sequences") as done:
        options = {"block_size": block_size, "progress": done, **options}
        if job is None:
            result = likelihood(network, **sequences, **options)  # type: ignore[arg-type]
        else:
            result = likelihood_in(job, network, sequences, **options)
    per_byte = packed.corpus_tokens / packed.bytes
    return {
        "model": model,
        "kind": network.config.kind,
        "block_size": min(
            network.config.block_size if block_size is None else block_size, packed.length
        ),
        "length": packed.length,
        "data": data,
        **result.record(),
        "tokens_per_byte": per_byte,
        "nats_per_byte": result.nats_per_token * per_byte,
        "bits_per_byte": result.bits_per_token * per_byte,
        "bits_per_byte_stderr": result.stderr / math.log(2) * per_byte,
    }


def likelihood_in(
    job: Job,
    network: Denoiser,
    sequences: dict[str, Tensor],
    *,
    batch_size: int | None,
    progress: Callable[[int], None],
    **options: Any,
) -> Likelihood:
    """`likelihood` of what a job has not measured yet, together with what it has.

    Its lines: `id`, the sequence's number, `nats`, `error` and `tokens`, as in `Likelihood`.
    """
    count, length = sequences["x_0"].shape
    text = {name: zlib.crc32(x.cpu().numpy().tobytes()) for name, x in sequences.items()}
    told = {"task": "evaluate", "weights": fingerprint(network), "sequences": count}
    settings = {**told, "length": length, **options, **text}
    budget = tokens_per_pass(network)
    at_once = max(1, budget // (2 * length)) if batch_size is None else batch_size
    job.begin(settings, range(count), kept={"budget": budget, "at_once": at_once})
    at_once, budget = job.kept["at_once"], job.kept["budget"]
    progress(job.done)
    # What is measured together stays together, for its last digits; there is always something
    # to measure, which says what estimator it was.
    for start in range(min(job.done, count - 1) // at_once * at_once, count, at_once):
        part = slice(start, start + at_once)
        x: dict[str, Any] = {name: values[part] for name, values in sequences.items()}
        found = likelihood(
            network, **x, **options, budget=budget, batch_size=at_once,
            rows=torch.arange(count)[part],
        )  # fmt: skip
        assert found.errors is not None
        each = zip(found.nats.tolist(), found.errors.tolist(), found.tokens.tolist(), strict=True)
        new = [
            {"id": number, "nats": nats, "error": error, "tokens": tokens}
            for number, (nats, error, tokens) in enumerate(each, start=start)
        ][job.done - start :]
        job.write(new)
        progress(len(new))
    job.sync()
    lines = list(job.records())
    nats, errors, tokens = (
        torch.tensor([math.nan if one[name] is None else one[name] for one in lines], dtype=dtype)
        for name, dtype in (("nats", torch.float64), ("error", torch.float64), ("tokens", None))
    )
    return summed_up(nats, errors, tokens, found.estimator, found.draws, found.exact)


def summary_table(record: dict[str, object]) -> str:
    """A record for people."""
    bound = "" if record["estimator"] == "ar" else "≤ "
    per_token, error = record["nats_per_token"], record["stderr"]
    assert isinstance(per_token, float) and isinstance(error, float)
    figures = (
        ("perplexity per token", "perplexity", record["perplexity_stderr"], 3),
        ("nats per token", "nats_per_token", error, 4),
        ("bits per token", "bits_per_token", error / math.log(2), 4),
        ("bits per byte", "bits_per_byte", record["bits_per_byte_stderr"], 4),
    )
    rows = [
        (label, f"{bound}{record[key]:.{digits}f}", f"{spread:.{digits}f}")
        for label, key, spread, digits in figures
    ]
    masks = record["mask_stderr"]
    assert isinstance(masks, float)
    noise = "none" if masks == 0 else f"{masks:.4f} nats per token"
    caption = (
        f"{record['kind']}, L' = {record['block_size']}, {record['sequences']} sequences of "
        f"{record['length']} tokens; estimator {record['estimator']}, noise of the masks: {noise}"
    )
    title = f"{record['model']} on {names_of(record['data'])} ({record['part']})"
    head = ("measure", "value", "± standard error")
    return table_text(head, rows, 88, title=title, caption=caption)
