"""What a measurement can be told; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.registry import ORDERS, BoundName
from blockdiff.sampling.options import SamplingOptions
from blockdiff.training.config import Detokenizer, Format

Part = Literal["all", "train", "validation"]
Precision = Literal["auto", "float32", "bf16", "int8"]


class Opening(Protocol):
    """Options that say how a model is opened to be measured."""

    @property
    def tokenizer(self) -> str | None: ...
    @property
    def precision(self) -> Precision: ...


@dataclass(frozen=True)
class CorpusOptions:
    """A text, or a part of it.

    Attributes:
        data: Corpus: pydoc, files (txt, jsonl, parquet; .xz and .gz too), a folder, or a hub id;
            may be given several times.
        part: all, or the train or validation documents of the split training made; of the text
            the model was trained on, what its run held out, else all. There, what is left out
            below is as in that run, too.
        validation_fraction: Share of the text held out in that split; else 0.05.
        split_seed: Seed of that split; else 0.
        text_column: Column of JSON lines, Parquet or a hub data set that holds the text.
        split: Split of a hub data set.
        subset: Subset of a hub data set.
        detokenizer: What undoes a benchmark's own marks.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
    """

    data: str | list[str]
    part: Part | None = None
    validation_fraction: float | None = None
    split_seed: int | None = None
    text_column: str | None = None
    split: str | None = None
    subset: str | None = None
    detokenizer: Detokenizer | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        checks.options(self, {}, {})


@dataclass(frozen=True)
class TextOptions(CorpusOptions):
    """A text to measure on, in windows.

    Attributes:
        format: text, chat or prompt, as in training; else text. Of the last two only responses
            count.
        length: Tokens per sequence; the model's context, at most 1024, when left out.
        bos: Put a beginning-of-text token before each document.
        eos: Put an end-of-text token behind each document; else true.
        across_documents: Let windows run across documents; otherwise pad at each document's end.
        window_marks: Begin every window with a beginning-of-text token and end it with an
            end-of-text token.
    """

    format: Format | None = None
    length: int | None = None
    bos: bool | None = None
    eos: bool | None = None
    across_documents: bool | None = None
    window_marks: bool | None = None


@dataclass(frozen=True)
class EvaluateOptions(TextOptions):
    """Measure the likelihood of a text under a model.

    Attributes:
        block_size: Block size L'; the model's own when left out.
        estimator: What bounds the likelihood: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per sequence, where masks are not enumerated.
        timesteps: Time steps T of d3pm.
        windows: Sequences measured, evenly spread; 0 is all of them.
        batch_size: Sequences per pass; chosen by size when left out.
        seed: Seed of the masks.
        precision: Weights; auto is bf16 where the processor is made for it.
        out: File of JSON lines with the nats of each sequence; a measurement that was stopped goes
            on with the same command.
        overwrite: Begin the measurement of --out anew.
    """

    block_size: int | None = None
    estimator: BoundName = "auto"
    draws: int = 8
    timesteps: int = 1000
    windows: int = 0
    batch_size: int | None = None
    seed: int = 0
    precision: Precision = "float32"
    out: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        super().__post_init__()
        if self.overwrite and self.out is None:
            raise InputError("`overwrite` is for a file of figures: give `out` as well")


@dataclass(frozen=True)
class VarianceOptions(TextOptions):
    """Measure how noisy the estimators of the bound are: loss and gradient, masks and data apart.

    Attributes:
        block_sizes: Block sizes L', for example 1,4,16; the model's own when left out.
        estimators: Which, with commas, for example bernoulli:cosine,clipped:0.3:0.8,
            exact_k+stratified; all of the paper's and ours when left out.
        batch_size: Sequences in a batch; the variance is that of a batch's mean.
        batches: Batches, each with its own text.
        draws: Draws of masks for each batch.
        gradient: Measure the gradient too.
        seed: Seed of the masks.
    """

    block_sizes: str | None = None
    estimators: str | None = None
    batch_size: int = 8
    batches: int = 8
    draws: int = 16
    gradient: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        meaning = ": a variance is one of several"
        checks.whole_number("draws", self.draws, 2, checks.LARGEST_TEXT, meaning)


@dataclass(frozen=True)
class ZeroShotOptions:
    """Perplexity on texts the model was not trained on: the paper's, or any other, in one table.

    A text that cannot be measured is named, and the others are measured.

    Attributes:
        texts: With commas: ptb, wikitext2, wikitext103, lm1b, lambada, ag_news, pubmed, arxiv (from
            the Hugging Face hub), files, or hub ids, with :DETOKENIZER after those that need one,
            for example news.txt:lm1b.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        length: Tokens per sequence; the model's context, at most 1024, when left out.
        bos: Put a beginning-of-text token before each document.
        eos: Put an end-of-text token behind each document.
        window_marks: Begin every window with a beginning-of-text token and end it with an
            end-of-text token; with --no-eos as the paper does.
        windows: Sequences measured of each text, evenly spread; 0 is all of them.
        estimator: What bounds the likelihood: auto is enumerate up to L' = 4, else exact_k.
        draws: Noised copies per sequence, where masks are not enumerated.
        seed: Seed of the masks.
        precision: Weights; auto is bf16 where the processor is made for it.
    """

    texts: str | list[str] = "ptb,wikitext103,lm1b,lambada,ag_news,pubmed,arxiv"
    tokenizer: str | None = None
    length: int | None = None
    bos: bool = False
    eos: bool = True
    window_marks: bool = False
    windows: int = 0
    estimator: BoundName = "auto"
    draws: int = 8
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        checks.options(self, {}, {})


@dataclass(frozen=True)
class SampleOptions:
    """Measure generated texts: perplexity under a judge, entropy, diversity, distance from text.

    Attributes:
        samples: What `generate --json` printed (.json), or a corpus of texts; with `temperatures` a
            model folder or hub id.
        judge: Causal language model (folder or hub id) for generative perplexity, for example
            gpt2-large, or an AR model of this package.
        window: Tokens the judge reads at once; 1024, moved by half, or what it was made for.
        tokenizer: Folder or hub id of the tokenizer whose tokens are counted; the judge's own when
            left out.
        reference: Corpus of real text, for the n-gram divergence; the judge is tried on it too.
        part: all, or the train or validation documents of the split training made.
        validation_fraction: Share of the text held out in that split.
        split_seed: Seed of that split.
        text_column: Column of the reference that holds the text.
        words: Words in each piece of the reference.
        mauve: Also measure MAUVE between samples and reference, by the judge's last hidden states
            (needs mauve-text: pip install 'blockdiff[eval]').
        seed: Seed of resampling and shuffling.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
    """

    samples: str
    judge: str | None = None
    window: int | None = None
    tokenizer: str | None = None
    reference: str | None = None
    part: Part = "all"
    validation_fraction: float = 0.05
    split_seed: int = 0
    text_column: str = "text"
    words: int = 200
    mauve: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        numbers = ("window", "words", "seed", "split_seed", "validation_fraction")
        checks.numbers(**{name: getattr(self, name) for name in numbers})
        if self.mauve and (self.judge is None or self.reference is None):
            raise InputError(
                "MAUVE compares what a `judge` makes of the samples and of a `reference`: give both"
            )


# Lists of the command line → the setting whose values they are.
LISTS = {
    "tokens_per_step": "tokens_per_step",
    "steps": "steps",
    "thresholds": "threshold",
    "margins": "margin",
    "entropy_bounds": "entropy_bound",
}


@dataclass(frozen=True)
class TuneOptions(CorpusOptions):
    """Choose how a model decodes: quality against speed over orders and their settings.

    Attributes:
        samples: Texts that each setting writes.
        prompt_tokens: Tokens of real text that each begins with.
        max_new_tokens: New tokens of each.
        orders: Orders to try, with commas; all that the model allows when left out.
        block_sizes: Block sizes L', for example 1,4,16; those the model was trained with when left
            out.
        temperatures: Temperatures, for example 0.7,1; the first is the reference's. The chosen one
            is written only where this is given.
        tokens_per_step: Tokens an evaluation of confidence and entropy, for example 2,4.
        steps: Steps per block, in the place of tokens_per_step.
        thresholds: Thresholds, for example 0.9,0.7.
        margins: Margins.
        entropy_bounds: Entropy bounds, in nats.
        judge: Causal language model (folder or hub id) that measures perplexity; when left out the
            model itself, at L' = 1 where it has that, else by its own bound.
        window: Tokens the judge reads at once; 1024, moved by half, or what it was made for.
        tolerance: By what share a setting's perplexity may exceed the reference's.
        entropy_tolerance: By what share its texts' entropy may fall short of the reference's.
        batch_size: Texts written at once where speed is measured.
        repeats: Times that speed is measured, all settings in turn; the median counts.
        seed: Seed of the prompts and texts.
        precision: Weights: float32, bf16, int8, or auto (bf16 where the processor is made for it).
        out: Folder for tuning.json and tuning.png; `tuning` in the model's folder when left out.
            What is there already is not measured again.
        overwrite: Measure everything anew.
        write: Write the choice into the model folder's generation_config.json.
    """

    samples: int = 64
    prompt_tokens: int = 32
    max_new_tokens: int = 128
    orders: str | None = None
    block_sizes: str | None = None
    temperatures: str | None = None
    tokens_per_step: str | None = None
    steps: str | None = None
    thresholds: str | None = None
    margins: str | None = None
    entropy_bounds: str | None = None
    judge: str | None = None
    window: int | None = None
    tolerance: float = 0.05
    entropy_tolerance: float = 0.02
    batch_size: int = 1
    repeats: int = 3
    seed: int = 0
    precision: Precision = "auto"
    out: str | None = None
    overwrite: bool = False
    write: bool = True

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers, names and lists that cannot be meant."""
        whole = {
            "samples": (2, checks.LARGEST_TEXT),
            "prompt_tokens": (1, checks.LARGEST_SIZE),
            "max_new_tokens": (2, checks.LARGEST_TEXT),
            "repeats": (1, checks.LARGEST_TEXT),
        }
        shares = {"tolerance": (0, 1e3, False, False), "entropy_tolerance": (0, 1, False, False)}
        checks.options(self, whole, shares)
        if self.steps is not None and self.tokens_per_step is not None:
            raise InputError("`steps` and `tokens_per_step` both say how many tokens: give one")
        names = self.order_names
        for name, setting in LISTS.items():
            values = self.values(name)
            readers = [one for one in ORDERS if setting in ORDERS.words("reads", one)]
            if values and names and not set(names) & set(readers):
                raise InputError(
                    f"`{name}` is read by none of the `orders`; add {' or '.join(readers)}"
                )
            for value in values:
                SamplingOptions(**{setting: value})
        for value in self.values("temperatures"):
            SamplingOptions(temperature=value)
        self.values("block_sizes")

    @property
    def order_names(self) -> list[str]:
        """Those asked for; none where the choice is left to the model."""
        if self.orders is None:
            return []
        names = [name.strip() for name in self.orders.split(",")]
        for name in names:
            checks.one_of("orders", name, [*ORDERS])
        return list(dict.fromkeys(names))

    def values(self, name: str) -> tuple[Any, ...]:
        """The numbers in a list, none twice; none where it was left out."""
        text = getattr(self, name)
        if text is None:
            return ()
        if name in ("block_sizes", "steps", "tokens_per_step"):
            return checks.whole_numbers(name, text)
        return checks.real_numbers(name, text)
