"""The command line: `blockdiff train | evaluate | variance | generate | …`.

Bad input ends in one line on standard error and exit code 2. Nothing heavy is imported before a
command is known.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from blockdiff.allocator import keep_freed_memory
from blockdiff.benchmark.options import WORKS, BenchmarkOptions
from blockdiff.errors import InputError, RunStopped
from blockdiff.outputs import new_file, to_json
from blockdiff.training.config import TrainConfig


@dataclass(frozen=True)
class DataOptions:
    """A text to measure on.

    Attributes:
        data: Corpus: pydoc, files (txt, jsonl, parquet; .xz and .gz too), a folder, or a hub id.
        part: all, or the train or validation documents of the split training made; of the text
            the model was trained on, what its run held out, else all. There, what is left out
            below is as in that run, too.
        validation_fraction: Share of the text held out in that split; else 0.05.
        split_seed: Seed of that split; else 0.
        text_column: Column of JSON lines, Parquet or a hub data set that holds the text.
        split: Split of a hub data set.
        subset: Subset of a hub data set.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        length: Tokens per sequence; the model's own context when left out.
        bos: Put a beginning-of-text token before each document.
        across_documents: Let windows run across documents; otherwise pad at each document's end.
        detokenizer: What undoes a benchmark's own marks: none, wikitext, ptb, lm1b, lambada or
            scientific.
    """

    data: str
    part: str | None = None
    validation_fraction: float | None = None
    split_seed: int | None = None
    text_column: str | None = None
    split: str | None = None
    subset: str | None = None
    tokenizer: str | None = None
    length: int | None = None
    bos: bool | None = None
    across_documents: bool | None = None
    detokenizer: str | None = None


@dataclass(frozen=True)
class ZeroShotOptions:
    """Perplexity on texts the model was not trained on: the paper's, or any other, in one table.

    Attributes:
        texts: With commas: ptb, wikitext2, wikitext103, lm1b, lambada, ag_news, pubmed, arxiv (from
            the Hugging Face hub), files, or hub ids, with :DETOKENIZER after those that need one,
            for example news.txt:lm1b.
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        length: Tokens per sequence; the model's own context when left out.
        bos: Put a beginning-of-text token before each document.
        windows: Sequences measured of each text, evenly spread; 0 is all of them.
        estimator: auto (enumerate up to L' = 4, else exact_k), or enumerate, exact_k, paired,
            bernoulli.
        draws: Noised copies per sequence, where masks are not enumerated.
        seed: Seed of the masks.
        precision: Weights: float32, bf16, int8, or auto (bf16 where it is faster).
        json: Print one JSON array.
    """

    texts: str = "ptb,wikitext103,lm1b,lambada,ag_news,pubmed,arxiv"
    tokenizer: str | None = None
    length: int | None = None
    bos: bool = False
    windows: int = 0
    estimator: str = "auto"
    draws: int = 8
    seed: int = 0
    precision: str = "float32"
    json: bool = False


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure the likelihood of a text under a model.

    Attributes:
        block_size: Block size L'; the model's own when left out.
        estimator: auto (enumerate up to L' = 4, else exact_k), or one of those that bound the
            likelihood: enumerate, exact_k, paired, bernoulli, d3pm.
        draws: Noised copies per sequence, where masks are not enumerated.
        timesteps: Time steps T of d3pm.
        windows: Sequences measured, evenly spread; 0 is all of them.
        batch_size: Sequences per pass; chosen by size when left out.
        seed: Seed of the masks.
        precision: Weights: float32, bf16, int8, or auto (bf16 where it is faster).
        json: Print one JSON object.
    """

    block_size: int | None = None
    estimator: str = "auto"
    draws: int = 8
    timesteps: int = 1000
    windows: int = 0
    batch_size: int | None = None
    seed: int = 0
    precision: str = "float32"
    json: bool = False


@dataclass(frozen=True)
class VarianceOptions:
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
        plot: Also draw the result, as a PNG.
        json: Print one JSON object.
    """

    block_sizes: str | None = None
    estimators: str | None = None
    batch_size: int = 8
    batches: int = 8
    draws: int = 16
    gradient: bool = True
    seed: int = 0
    plot: str | None = None
    json: bool = False


@dataclass(frozen=True)
class SampleOptions:
    """Measure generated texts: perplexity under a judge, entropy, diversity, distance from text.

    Attributes:
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
        seed: Seed of resampling and shuffling.
        json: Print one JSON object.
    """

    judge: str | None = None
    window: int | None = None
    tokenizer: str | None = None
    reference: str | None = None
    part: str = "all"
    validation_fraction: float = 0.05
    split_seed: int = 0
    text_column: str = "text"
    words: int = 200
    seed: int = 0
    json: bool = False


@dataclass(frozen=True)
class GenerateOptions:
    """Write text.

    Attributes:
        prompt: Text to continue; without one a new text is begun.
        prompt_file: File with one prompt a line.
        samples: Texts per prompt.
        precision: Weights: float32, bf16, int8 (fastest for a single text), or auto (bf16 where it
            is faster).
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        compile: Compile the layers; on CUDA into CUDA graphs.
        watch: Show the denoising live in the terminal.
        delay: Seconds to wait after each step of --watch.
        page: Also write an HTML page that replays the first text's denoising.
        json: Print one JSON object with texts, nfe and tokens per second.
    """

    prompt: str | None = None
    prompt_file: str | None = None
    samples: int = 1
    precision: str = "auto"
    tokenizer: str | None = None
    compile: bool = False
    watch: bool = False
    delay: float = 0.0
    page: str | None = None
    json: bool = False


@dataclass(frozen=True)
class TokenizerOptions:
    """Train a byte-level BPE tokenizer on a corpus.

    Attributes:
        data: Corpus, as for train.
        out: Folder for the tokenizer.
        vocab_size: Tokens in all, special ones included.
        text_column: Column that holds the text.
        overwrite: Replace a tokenizer that is there.
    """

    data: str = "pydoc"
    out: str = "runs/tokenizer"
    vocab_size: int = 2048
    text_column: str = "text"
    overwrite: bool = False


@dataclass(frozen=True)
class DemoOptions:
    """Train AR and a BD3-LM on the machine's own Python documentation and compare them.

    Attributes:
        out: Folder for models, report, plot and page.
        minutes: Time to stay within; fewer steps are trained on a slow machine.
        seed: Seed of everything random.
        overwrite: Replace the demo that is there.
    """

    out: str = "runs/demo"
    minutes: float = 8.0
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class ReproduceOptions:
    """The paper's comparisons in miniature: train, measure, sample and report, in hours on a CPU.

    Attributes:
        data: Corpus, as for train; the committed report is of State of the Union addresses.
        out: Folder for checkpoints, results, plots and report; the same command goes on where it
            was stopped.
        workers: Processes, each on one core; all cores when left out.
        smoke: The whole of it, minute: minutes instead of hours, to see that it runs.
        overwrite: Replace the reproduction that is there.
    """

    data: str = "pydoc"
    out: str = "runs/paper-mini"
    workers: int | None = None
    smoke: bool = False
    overwrite: bool = False


class _Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line and `--two-words` for `--two_words`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(_one_line(message, self))

    def format_help(self, *args: Any, **options: Any) -> str:
        text = super().format_help(*args, **options)
        return re.sub(r"--\w+(_\w+)+", lambda m: m[0].replace("_", "-"), text)


def _one_line(message: str, parser: ArgumentParser) -> str:
    """argparse's and jsonargparse's messages, shortened to what is wrong and how to mend it."""
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        option = unknown[1].split("=")[0]
        near = difflib.get_close_matches(option, _options(parser), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0].replace('_', '-')}?" if near else "; see --help"
        return f"unknown option {option.replace('_', '-')}{hint}"
    bad_value = re.search(r'(?:Parser key|key) "([\w.]+)"', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if bad_value and given:
        wanted = sorted(set(re.findall(r"Expected an? (?:type )?<class '(\w+)'>", message)))
        expected = " or ".join(w for w in wanted if w != "NoneType")
        option = bad_value[1].split(".")[-1].replace("_", "-")
        return f"--{option} cannot be {given[1]!r}" + (f"; expected {expected}" if expected else "")
    return " ".join(message.split())


def _options(parser: ArgumentParser) -> list[str]:
    """Every option of the parser and of its subcommands."""
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        choices = getattr(action, "choices", None)
        if isinstance(choices, dict):
            for sub in choices.values():
                found += [option for a in sub._actions for option in a.option_strings]
    return [option for option in found if option.startswith("--")]


def _as_typed(message: str, command: str) -> str:
    """A message with its options, `names_in_backticks`, as the command's user types them."""
    first, others, _, positional = _commands()[command]
    options = {field.name for kind in (first, *others) for field in fields(kind)}

    def typed(found: re.Match[str]) -> str:
        name = found[1]
        if name in options:
            return "--" + name.replace("_", "-")
        return name if positional is None or name != positional[0] else name.upper()

    return re.sub(r"`(\w+)`", typed, message)


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"blockdiff: error: {message}", file=sys.stderr)
    raise SystemExit(code)


# the commands


def _train(given: Namespace) -> None:
    from blockdiff.plots import loss_plot
    from blockdiff.training.callbacks import METRICS_FILE, read_metrics
    from blockdiff.training.run import train

    result = train(_dataclass(TrainConfig, given), given=given.named)
    if not result.is_main_process:
        return
    plot = result.folder / "loss.png"
    if result.steps or not plot.exists():
        lines = {"training": read_metrics(result.folder / METRICS_FILE)}
        loss_plot(lines, plot, title=str(result.folder))
    if not result.steps:
        print(f"{result.folder}: its steps were all done")
    print(
        f"{result.folder}: perplexity {result.metrics['eval_perplexity']:.2f} "
        f"({result.metrics['eval_nats_per_token']:.4f} ± {result.metrics['eval_stderr']:.4f} "
        f"nats per token) after {result.tokens_seen:,} tokens in {result.seconds:.0f} s"
    )


def _evaluate(given: Namespace) -> None:
    from blockdiff.evaluation.corpus import evaluate_corpus, summary_table

    options = _dataclass(EvaluateOptions, given)
    arguments = {k: v for k, v in asdict(options).items() if k != "json"}
    record = evaluate_corpus(given.model, **arguments, **asdict(_dataclass(DataOptions, given)))
    print(to_json(record, indent=2) if options.json else summary_table(record))


def _zero_shot(given: Namespace) -> None:
    from blockdiff.evaluation.zero_shot import zero_shot, zero_shot_table

    options = _dataclass(ZeroShotOptions, given)
    arguments = {k: v for k, v in asdict(options).items() if k != "json"}
    records = zero_shot(given.model, **arguments)
    print(to_json(records, indent=2) if options.json else zero_shot_table(records))


def _variance(given: Namespace) -> None:
    from blockdiff.evaluation.variance import measure_corpus, variance_table
    from blockdiff.plots import variance_plot

    options = _dataclass(VarianceOptions, given)
    if options.plot is not None:
        new_file("plot", options.plot)
    arguments = {k: v for k, v in asdict(options).items() if k not in ("json", "plot")}
    data = asdict(_dataclass(DataOptions, given))
    found = measure_corpus(given.model, **arguments, **data)
    records = [x.record() for x in found]
    if options.plot:
        variance_plot(records, Path(options.plot), title=f"{given.model} on {data['data']}")
    record = {"model": given.model, "data": data["data"], "estimators": records}
    print(to_json(record, indent=2) if options.json else variance_table(found))


def _evaluate_samples(given: Namespace) -> None:
    from blockdiff.evaluation.samples import measure_samples, quality_table

    options = _dataclass(SampleOptions, given)
    arguments = {k: v for k, v in asdict(options).items() if k != "json"}
    found = measure_samples(given.samples, **arguments)
    records = {name: quality.record() for name, quality in found.items()}
    print(to_json(records, indent=2) if options.json else quality_table(found))


def _generate(given: Namespace) -> None:
    from blockdiff.sampling.options import SamplingOptions
    from blockdiff.writing import write_texts

    write_texts(given.model, _dataclass(GenerateOptions, given), _dataclass(SamplingOptions, given))


def _tokenizer(given: Namespace) -> None:
    from blockdiff.data.corpora import load_corpus
    from blockdiff.data.tokenizers import train_tokenizer
    from blockdiff.models.hub import staging

    options = _dataclass(TokenizerOptions, given)
    out = Path(options.out)
    if out.exists() and any(out.iterdir()) and not options.overwrite:
        raise InputError(f"{out} is not empty; replace what is there with --overwrite")
    corpus = load_corpus(options.data, text_column=options.text_column)
    tokenizer = train_tokenizer(corpus, options.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    with staging(out) as temporary:
        tokenizer.save_pretrained(temporary)
    print(f"{out}: {len(tokenizer)} tokens, mask token {tokenizer.mask_token!r}")


def _benchmark(given: Namespace) -> None:
    from blockdiff.benchmark.report import benchmark, describe

    options = _dataclass(BenchmarkOptions, given)
    record = benchmark(given.work, options)
    print(to_json(record, indent=2) if options.json else describe(record))


def _demo(given: Namespace) -> None:
    from blockdiff.demo import demo

    demo(**asdict(_dataclass(DemoOptions, given)))


def _reproduce(given: Namespace) -> None:
    from blockdiff.reproduction.pool import reproduce

    if given.what != "paper-mini":
        raise InputError(f"nothing called {given.what!r} to reproduce; there is paper-mini")
    reproduce(**asdict(_dataclass(ReproduceOptions, given)))


# name and help of a positional argument
Positional = tuple[str, str]
Command = tuple[type, tuple[type, ...], Callable[[Namespace], None], Positional | None]


def _commands() -> dict[str, Command]:
    """name → (first options class, others, what to run, its positional argument)."""
    from blockdiff.sampling.options import SamplingOptions

    model = ("model", "Model folder or hub id; starter is the one that comes with the package.")
    samples = ("samples", "What `generate --json` printed (.json), or a corpus of texts.")
    what = ("what", "What is reproduced: paper-mini.")
    work = ("work", f"What is timed: {', '.join(WORKS)}.")
    return {
        "train": (TrainConfig, (), _train, None),
        "evaluate": (DataOptions, (EvaluateOptions,), _evaluate, model),
        "zero-shot": (ZeroShotOptions, (), _zero_shot, model),
        "variance": (DataOptions, (VarianceOptions,), _variance, model),
        "evaluate-samples": (SampleOptions, (), _evaluate_samples, samples),
        "generate": (GenerateOptions, (SamplingOptions,), _generate, model),
        "tokenizer": (TokenizerOptions, (), _tokenizer, None),
        "benchmark": (BenchmarkOptions, (), _benchmark, work),
        "reproduce": (ReproduceOptions, (), _reproduce, what),
        "demo": (DemoOptions, (), _demo, None),
    }


def _dataclass(kind: type, given: Namespace) -> Any:
    return kind(**{field.name: getattr(given, field.name) for field in fields(kind)})


def build_parser() -> ArgumentParser:
    """The whole command line; each option's help is its dataclass's attribute text."""
    from blockdiff import __version__

    parser = _Parser(prog="blockdiff", description="Block diffusion language models.")
    parser.add_argument("--version", action="version", version=f"blockdiff {__version__}")
    subcommands = parser.add_subcommands(dest="command", required=True)
    for name, (first, others, _, positional) in _commands().items():
        described = others[0] if first is DataOptions else first
        summary = (described.__doc__ or "").strip().splitlines()[0]
        command = _Parser(description=summary)
        command.add_argument("--config", action="config", help="YAML file with these options.")
        if positional is not None:
            command.add_argument(positional[0], help=positional[1])
        for options in (first, *others):
            command.add_class_arguments(options)
        subcommands.add_subcommand(name, command, help=summary)
    return parser


def _normalise(argv: Sequence[str]) -> list[str]:
    """`--two-words` → `--two_words`, and a bare switch → `--switch=true`."""
    kinds = [kind for first, others, *_ in _commands().values() for kind in (first, *others)]
    switches = {f"--{f.name}" for kind in kinds for f in fields(kind) if f.type in ("bool", bool)}
    words = []
    for i, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("-", "_").replace("__", "--", 1)
            following = argv[i + 1].lower() if i + 1 < len(argv) else ""
            if name in switches and not equals and following not in ("true", "false"):
                equals, value = "=", "true"
            word = name + equals + value
        words.append(word)
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; exit code 0, or 2 with one line on standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser, words = build_parser(), _normalise(sys.argv[1:] if argv is None else argv)
    given = parser.parse_args(words)
    # Without the defaults: the options that were given, here or in a --config file.
    named = parser.parse_args(words, defaults=False)
    given[given.command].named = frozenset(vars(named[given.command]))
    run = _commands()[given.command][2]
    keep_freed_memory()
    try:
        _quiet()
        run(given[given.command])
    except InputError as error:
        code = error.exit_code if isinstance(error, RunStopped) else 2
        fail(_as_typed(" ".join(str(error).split()), given.command), code)
    except KeyboardInterrupt:
        fail("interrupted; what was saved before is whole (train: continue with --resume)")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not _disk_full(error):
            raise
        fail("the disk is full; what was saved before is whole: free some space and --resume")


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left on device" in str(error) or "os error 28" in str(error):
        return True
    # torch's own writer reports a short write without the reason behind it.
    return "PytorchStreamWriter failed writing" in str(error)


def _quiet() -> None:
    """Keeps the libraries' chatter out of our output."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    warnings.showwarning = lambda message, *place: print(f"blockdiff: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
