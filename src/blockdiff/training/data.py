"""The text of a run: corpora, the text held out, tokenizer and windows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from blockdiff.data.chat_templates import read_template
from blockdiff.data.conversations import Conversations, pack_conversations, words_of
from blockdiff.data.corpora import Corpus, load_corpus, split_documents
from blockdiff.data.detokenizers import detokenized
from blockdiff.data.mixture import MixedStream, MixedWindows, chained
from blockdiff.data.packing import StreamedWindows, Windows, pack, require_cache
from blockdiff.data.tokenizers import load_tokenizer, train_tokenizer
from blockdiff.data.windows import stack
from blockdiff.errors import InputError
from blockdiff.models.hub import resolve
from blockdiff.models.loading import load_tokenizer_of, require_own
from blockdiff.training.config import TrainConfig

# In the place of a fingerprint: a stream is never read to its end.
UNKNOWN = "a stream has no fingerprint"


@dataclass(frozen=True)
class TrainingData:
    """`train`: windows to train on; `validation`: x_0 [B, L] (documents and maskable [B, L]).

    `fingerprints`: of both texts, as run.json keeps them. `conversations`: of both, what became of
    them (see `pack_conversations`); empty for text.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset[dict[str, Tensor]]
    validation: dict[str, Tensor]
    fingerprints: dict[str, str] = field(default_factory=dict)
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)


def prepare_data(
    config: TrainConfig, process: tuple[int, int] = (0, 1), prompt_grid: str = "absolute"
) -> TrainingData:
    """Corpus, split, tokenizer and windows of a run.

    `process` (number, count): whose share of a stream it is; the first tells how far it is.
    `prompt_grid`: the model's convention, for conversations.
    """
    require_cache()
    progress = process[0] == 0
    template = _template(config)
    tokenizer = _known_tokenizer(config, template)
    sources, weights = config.mixture()
    texts, held_out = [], []
    for source in sources:
        corpus = _open(config, source, config.split, process if config.streaming else None)
        text, held = _split(config, source, corpus, progress)
        texts.append(text)
        held_out.append(held)
    if config.validation_data is not None:  # one text for all of a mixture
        held_out = held_out[:1]
    if tokenizer is None:
        if config.streaming:
            raise InputError("a streamed corpus needs a `tokenizer`")
        words: Iterable[str] = chained("the corpus", texts)
        words = words if config.format == "text" else words_of(words)
        tokenizer = train_tokenizer(words, config.vocab_size)
        tokenizer.chat_template = template
    options: dict[str, Any] = {
        "length": config.length, "bos": config.bos, "eos": config.eos,
        "window_marks": config.window_marks,
    }  # fmt: skip
    whole = {**options, "across_documents": config.across_documents, "progress": progress}
    make: Callable[..., Windows] = pack
    if config.format != "text":
        make, whole = pack_conversations, {
            "format": config.format, "length": config.length, "block": lcm(*config.block_sizes),
            "prompt_grid": prompt_grid, "progress": progress,
        }  # fmt: skip
    windows: Dataset[dict[str, Tensor]]
    if config.streaming:
        streams = [StreamedWindows(text, tokenizer, endless=True, **options) for text in texts]
        windows = streams[0]
        if len(streams) > 1:
            windows = MixedStream(streams, weights, config.seed, process[0])
    else:
        windows = _mixed([make(text, tokenizer, **whole) for text in texts], weights)
        if len(windows) < config.batch_size:
            raise InputError(
                f"{config.data} fills {len(windows)} windows of {config.length} tokens, less than "
                f"a batch of {config.batch_size}: give more text, or lower `batch_size` or `length`"
            )
    name = "the text held out to validate on"
    if config.validation_data is None and config.validation_split is None:
        name += f" (`validation_fraction` {config.validation_fraction:g})"
    packed = [make(text, tokenizer, name=name, **whole) for text in held_out]
    validation = _mixed(packed, weights, repeat=False)
    fingerprints = {"train": _fingerprint(windows), "validation": _fingerprint(validation)}
    shown = stack(validation, config.eval_windows)
    counts = {}
    if config.format != "text":
        both = {"train": windows, "validation": validation}
        counts = {part: getattr(own, "conversations", {}) for part, own in both.items()}
        if progress:
            _tell(config, counts["train"])
    return TrainingData(tokenizer, windows, shown, fingerprints, counts)


def _tell(config: TrainConfig, found: dict[str, int]) -> None:
    """One line on standard error: what became of the conversations that are trained on."""
    names = config.data if isinstance(config.data, str) else ", ".join(config.data)
    print(
        f"blockdiff: {names}: {found['responses']} responses in {found['conversations']} "
        f"conversations; {found['cut']} of them cut at {config.length} tokens, "
        f"{found['left_out']} left out because their prompts fill it; {found['empty']} "
        "conversations without a response",
        file=sys.stderr,
    )


def _split(
    config: TrainConfig, source: str | list[str], corpus: Corpus, progress: bool
) -> tuple[Iterable[str], Iterable[str]]:
    """(text to train on, text held out) of one corpus of the run, or of all that are not mixed."""
    if config.validation_data is not None or config.validation_split is not None:
        split = config.validation_split or "train"
        return corpus, list(_open(config, config.validation_data or source, split))
    if config.streaming:
        raise InputError("a streamed corpus needs `validation_data` or `validation_split`")
    return split_documents(
        corpus, config.validation_fraction, config.seed,
        progress=progress, whole=config.format != "text",
    )  # fmt: skip


def _mixed(
    parts: list[Windows], weights: list[float], *, repeat: bool = True
) -> Windows | MixedWindows:
    return parts[0] if len(parts) == 1 else MixedWindows(parts, weights, repeat=repeat)


def _open(
    config: TrainConfig, data: str | list[str], split: str, process: tuple[int, int] | None = None
) -> Corpus:
    """A corpus of the run; as a stream, where `process` says whose share of it."""
    corpus = load_corpus(
        data,
        split=split,
        text_column=config.text_column,
        streaming=process is not None,
        subset=None if data == config.validation_data != config.data else config.subset,
        process=process or (0, 1),
        format=config.format,
    )
    return detokenized(corpus, config.detokenizer)


def _template(config: TrainConfig) -> str | None:
    """The chat template the run is told to use; a resumed run's tokenizer has it already.

    Raises `InputError` where it cannot be read.
    """
    if config.chat_template is None or _has_tokenizer(config):
        return None
    return read_template(config.chat_template)


def _has_tokenizer(config: TrainConfig) -> bool:
    return config.resume and (Path(config.out) / "tokenizer_config.json").is_file()


def _known_tokenizer(config: TrainConfig, template: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the run or the one it is told to use; None where it trains one.

    `template`: the chat template it is given. Raises `InputError` when it is not that of the model
    to start from, whatever its size.
    """
    if _has_tokenizer(config):
        return load_tokenizer(Path(config.out))
    source = config.tokenizer or config.init_from
    if source is None:
        if config.format == "chat" and template is None:
            raise InputError(
                "`format` chat needs a chat template, and a tokenizer that is trained here has "
                "none; give `chat_template`, or a `tokenizer` that has one"
            )
        return None
    load = load_tokenizer_of if config.tokenizer is None else load_tokenizer
    tokenizer = load(source, config.mask_token)
    if config.tokenizer is not None and config.init_from is not None:
        folder = resolve(config.init_from)
        if (folder / "tokenizer_config.json").is_file():
            require_own(tokenizer, folder, config.mask_token)
    tokenizer.chat_template = template or tokenizer.chat_template
    if config.format != "text":
        Conversations(tokenizer, config.format, 1, "absolute")  # refused before the text is read
    return tokenizer


def _fingerprint(windows: object) -> str:
    """A hash of text, tokenizer and packing; of a stream, words that say there is none."""
    return str(getattr(windows, "key", UNKNOWN))


def check_data(config: TrainConfig, record: dict[str, Any], data: dict[str, str]) -> None:
    """Raises `InputError` when the run began with another text than `data`, its fingerprints."""
    for part, what in (("train", "text"), ("validation", "text to validate on")):
        known = record.get("data", {}).get(part)
        if known is not None and known != data[part]:
            source = config.data if part == "train" else config.validation_data or config.data
            raise InputError(
                f"the {what} in {source} is not what the run in {config.out} began with; put the "
                "old one back, or begin another run in another `out`"
            )
