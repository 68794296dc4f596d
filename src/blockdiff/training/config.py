"""What a training run can be told; also the command line's and the YAML files' vocabulary.

Imports nothing heavy, so that `blockdiff train --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.registry import (
    ESTIMATORS,
    OBJECTIVES,
    Choices,
    EstimatorName,
    ObjectiveName,
    ScheduleName,
)
from blockdiff.training.limits import REAL_NUMBERS, WHOLE_NUMBERS

Preset = Literal["nano", "slim", "micro", "small", "medium"]
LrSchedule = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "float32", "bf16"]
Backend = Literal["auto", "dense", "blockwise", "flex"]
Clean = Literal["block", "causal"]
Prediction = Literal["same", "shift"]
Format = Literal["text", "chat", "prompt"]
Detokenizer = Literal["none", "wikitext", "ptb", "lm1b", "lambada", "scientific"]

BLOCK_SIZE = 4  # where neither the options nor the model to start from say
WHOLE = (0.0, 1.0)  # the clip that cuts nothing off
REPORTERS = ("tensorboard", "wandb", "none")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        out: Folder of the run: model, tokenizer, metrics and checkpoints.
        data: Corpus: pydoc, files (txt, jsonl, parquet; .xz and .gz too), a folder, or a hub id,
            @revision after it or not; may be given several times.
        validation_data: Corpus to validate on; by default documents held out of data.
        validation_split: Split of a hub data set to validate on: of validation_data, or of data.
        validation_fraction: Share of the text held out when neither is given.
        format: What a document is: text; chat, messages [{"role", "content"}, …] that go through
            the tokenizer's chat template; or prompt, a prompt with its response. Of the last two
            only responses are trained.
        chat_template: File with the chat template (Jinja) to use in place of the tokenizer's own;
            the run's tokenizer keeps it.
        text_column: Column of JSON lines, Parquet or a hub data set that holds the text; of a chat
            the messages, by default in the column messages.
        data_weights: Shares of the corpora of data, one each, for example 0.7,0.3: windows are
            drawn from each in that proportion. Left out, they are one text.
        split: Split of a hub data set.
        subset: Subset (configuration) of a hub data set.
        detokenizer: What undoes a benchmark's own marks.
        streaming: Read a hub data set as it is needed, keeping nothing on disk.
        tokenizer: Folder or hub id of a tokenizer; by default a BPE is trained on the corpus.
        vocab_size: Size of the trained BPE.
        mask_token: Mask token a tokenizer without one is given; a new one, not in its vocabulary.
        bos: Put a beginning-of-text token before each document.
        eos: Put an end-of-text token behind each document; false for a tokenizer that has none.
        across_documents: Let windows run across documents; otherwise pad at each document's end.
        window_marks: Begin every window with the beginning-of-text token and end it with the
            end-of-text token, as the paper does for LM1B.
        objective: What is trained; mdlm and sedd have one block of the whole length.
        length: Length L of the context, in tokens.
        block_size: Block size L' of bd3lm, by default 4, or what an adapted model to start from is
            for; or several, for example 1,4,8: each step trains one of
            them, drawn from seed and step. The largest is the model's own, for validation and
            sampling; the others may be chosen there.
        block_weights: Shares of the steps that each block size gets, one each, for example
            0.3,0.3,0.4; equal ones when left out.
        grow: Let the block size grow: the steps are cut into equal parts (or by block_weights), the
            first with blocks of 1, or of the smallest block_size of several, and each of the next
            with twice the size, up to the largest. That is the model's own, and the only one it is
            said to be trained for.
        clean: What a clean token sees of its block: all of it, as in the paper, or, causal, the
            tokens up to itself, so that one cache serves every block size.
        prediction: Whether the logits at i are for token i, as in the paper, or, with a causal
            clean stream, for token i + 1 (shift): the first token of a block is then AR's, and
            blocks of 1 are AR. A model to start from has its own.
        ar_weight: Weight of the AR part of joint.
        chain_rank: Rank of the chain over drafted tokens, which draft trains; 0 is none, or what a
            model to start from has.
        preset: Network size.
        init_from: Model folder, hub id or starter to start from, for example an AR model of this
            package; of a run's folder the weights and their average are both carried on.
        lora: Train an adapted model (init_from) by low-rank pairs of this rank, and leave its own
            weights as they are. The model in out has the pairs added in; out/adapter is peft's.
        lora_targets: Linear maps that get a pair, for example q_proj,v_proj.
        adaln: Give the network adaptive layer norms, as the paper does.
        time_conditioning: Feed the network the noise level; sedd always does.
        initial_shift: Standard deviation of their shifts at initialisation.
        estimator: How masks are drawn; clipped_redraw redraws them until their share lies in the
            clip.
        schedule: Noise schedule of bernoulli and d3pm.
        timesteps: Time steps T of d3pm.
        clip: Mask rates "β,ω" of clipped, for example 0.45,0.95; or auto, to search for the clip
            of least variance after each validation.
        steps: Optimizer steps.
        minutes: Stop after this many minutes of training, however many steps are left; 0 is never.
        batch_size: Windows per step, over all processes: the run is the same on any number.
        accumulate: Micro-batches each process's part of a step is cut into.
        lr: Learning rate.
        lr_schedule: Course of the learning rate after the warm-up.
        warmup: Warm-up steps; 0 begins at the full rate.
        weight_decay: Weight decay of AdamW; 0 is none.
        max_grad_norm: Gradient norm to clip at; 0 does not clip.
        dropout: Dropout; 0 is none.
        ema: Decay of the weights' moving average, which is what is evaluated and saved; 0 is off.
        precision: float32, bf16 (autocast), or auto: bf16 where the processor is made for it.
        backend: Attention.
        compile: Compile the layers with torch.compile.
        checkpoint_activations: Compute a layer's activations again in the backward: less memory,
            a third more work.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
        seed: Seed of weights, data order, masks and dropout, at most 2³² − 1.
        workers: Data loading processes.
        log_every: Steps between log lines.
        eval_every: Steps between validations; 0 validates at the end only.
        eval_windows: Windows validated on; 0 is all of them.
        eval_draws: Noised copies per window where masks cannot be enumerated.
        save_every: Steps between checkpoints.
        keep_last: Newest checkpoints that are kept.
        keep_every: Keep for good, too, the first checkpoint at or after every so many steps; 0
            keeps none.
        trainer_args: name=value of any other field of transformers.TrainingArguments, for example
            adam_beta2=0.95; may be given several times.
        report_to: Where metrics go beside metrics.jsonl: tensorboard, wandb, or none.
        resume: Continue the run in out from its last checkpoint.
        overwrite: Replace the run in out.

    Example:
        >>> import blockdiff
        >>> blockdiff.TrainConfig(data="notes.txt", steps=200, block_size=8).effective_block_size
        8
    """

    out: str = "runs/train"
    data: str | list[str] = "pydoc"
    data_weights: str | None = None
    validation_data: str | list[str] | None = None
    validation_split: str | None = None
    validation_fraction: float = 0.05
    format: Format = "text"
    chat_template: str | None = None
    text_column: str = "text"
    split: str = "train"
    subset: str | None = None
    detokenizer: Detokenizer = "none"
    streaming: bool = False
    tokenizer: str | None = None
    vocab_size: int = 2048
    mask_token: str = "<|mask|>"
    bos: bool = False
    eos: bool = True
    across_documents: bool = True
    window_marks: bool = False
    objective: ObjectiveName = "bd3lm"
    length: int = 128
    block_size: int | str | None = None
    block_weights: str | None = None
    grow: bool = False
    clean: Clean = "block"
    prediction: Prediction = "same"
    ar_weight: float = 1.0
    chain_rank: int = 0
    preset: Preset = "nano"
    init_from: str | None = None
    lora: int | None = None
    lora_targets: str = "all-linear"
    adaln: bool = True
    time_conditioning: bool = False
    initial_shift: float = 0.0
    estimator: EstimatorName = "exact_k"
    schedule: ScheduleName = "linear"
    timesteps: int = 1000
    clip: str | None = None
    steps: int = 1000
    minutes: float = 0.0
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-4
    lr_schedule: LrSchedule = "constant"
    warmup: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    ema: float = 0.9999
    precision: Precision = "auto"
    backend: Backend = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    device: str = "auto"
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_windows: int = 256
    eval_draws: int = 4
    save_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    trainer_args: str | list[str] | None = None
    report_to: str = "tensorboard"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant.

        An object in the place of a name is registered: run.json holds names.
        """
        for name, choices in checks.choices_of(TrainConfig).items():
            value = getattr(self, name)
            if isinstance(choices, Choices) and choices.takes(value):
                object.__setattr__(self, name, choices.registry.register(value).name)
        extra = self.trainer_args
        if isinstance(extra, Mapping):  # as Python's users write it
            extra = [f"{name}={as_typed(value)}" for name, value in extra.items()] or None
        extra = [extra] if isinstance(extra, str) else extra
        object.__setattr__(self, "trainer_args", extra)
        if self.block_size is not None:
            sizes = checks.whole_numbers("block_size", self.block_size)
            own = sizes[0] if len(sizes) == 1 else ",".join(map(str, sizes))
            object.__setattr__(self, "block_size", own)
        checks.options(self, WHOLE_NUMBERS, REAL_NUMBERS, smallest=checks.SMALLEST)
        self.mixture()
        for reporter in self.report_to.split(","):
            checks.one_of("report_to", reporter, REPORTERS)
        if not (self.tokenizer or self.init_from) and self.vocab_size < 258:
            raise InputError(
                f"`vocab_size` is {self.vocab_size}; it must be at least 258 (256 bytes and 2 "
                "special tokens)"
            )
        if not self.mask_token:
            raise InputError("`mask_token` is empty; name a token")
        if self.batch_size % self.accumulate:
            raise InputError(
                f"`batch_size` {self.batch_size} cannot be cut into {self.accumulate} equal "
                "micro-batches; make it a multiple of `accumulate`"
            )
        if self.resume and self.overwrite:
            raise InputError("`resume` and `overwrite` exclude each other; choose one")
        self._check_blocks()
        self._check_format()
        if self.clean != "block" and not OBJECTIVES.has(self.objective, "any_blocks"):
            raise InputError(
                f"`clean` {self.clean} is for blocks with clean ones before them, which an "
                f"{self.objective} model does not have; leave it out"
            )
        shifts = OBJECTIVES.has(self.objective, "shifts")
        if self.prediction == "shift" and self.clean != "causal" and not shifts:
            raise InputError("`prediction` shift needs `clean` causal")
        needs_clip = ESTIMATORS.has(self.estimator, "needs_clip")
        if needs_clip and self.clip_range() is None and not self.searches_clip:
            raise InputError(
                f"`estimator` {self.estimator} needs `clip`, for example 0.45,0.95, or auto"
            )
        if self.time_conditioning and not self.adaln:
            raise InputError("`time_conditioning` needs `adaln`: it is adaLN that reads the time")

    def mixture(self) -> tuple[list[str | list[str]], list[float]]:
        """(the corpora to mix, their shares, whose sum is 1); one, of all texts, without weights.

        Raises `InputError` for weights that are not one positive number for each of `data`.
        """
        if self.data_weights is None:
            return [self.data], [1.0]
        sources = [self.data] if isinstance(self.data, str) else self.data
        return list(sources), checks.shares(
            "data_weights", self.data_weights, len(sources), "`data`"
        )

    def _check_blocks(self) -> None:
        """Raises `InputError` for block sizes that do not fit the run."""
        stages, several = self._stages(), self.grow or isinstance(self.block_size, str)
        if not OBJECTIVES.has(self.objective, "any_blocks"):
            if several:
                option = "grow" if self.grow else "block_size"
                raise InputError(
                    f"`{option}`: the models of `objective` {self.objective} have one block size; "
                    "bd3lm has any"
                )
            return
        for size, _ in stages:
            if self.length % size:
                raise InputError(
                    f"`block_size` {size} does not divide `length` {self.length}; choose a divisor"
                )
        if self.block_weights is not None and not several:
            raise InputError("`block_weights` needs several sizes in `block_size`, or `grow`")
        if OBJECTIVES.has(self.objective, "trains") and 1 in [size for size, _ in stages]:
            raise InputError(
                f"`objective` {self.objective}: blocks of 1 are not drafted; give more"
            )
        if self.searches_clip and several:
            raise InputError("`clip` auto looks for the clip of one `block_size`; give two numbers")

    def _stages(self) -> list[tuple[int, float]]:
        """(block size, its share of the steps), ascending."""
        own = BLOCK_SIZE if self.block_size is None else self.block_size
        sizes = checks.whole_numbers("block_size", own)
        if self.grow:
            smallest, largest = (min(sizes) if len(sizes) > 1 else 1), max(sizes)
            sizes = tuple(smallest << i for i in range((largest // smallest).bit_length()))
            if sizes[-1] != largest:
                raise InputError(
                    f"`grow` doubles block sizes, and from {smallest} it does not come to "
                    f"{largest}; give another `block_size`"
                )
        of = f"block size ({', '.join(map(str, sizes))})"
        shares = checks.shares("block_weights", self.block_weights, len(sizes), of)
        return sorted(zip(sizes, shares, strict=True))

    def _check_format(self) -> None:
        """Raises `InputError` for options that conversations cannot have."""
        if self.format != "chat" and self.chat_template is not None:
            raise InputError("`chat_template` is for `format` chat")
        if self.format == "text":
            return
        for name in ("streaming", "detokenizer", "window_marks", "across_documents", "eos", "bos"):
            if getattr(self, name) != getattr(TrainConfig, name):
                raise InputError(f"`{name}` is for `format` text; leave it out with {self.format}")

    @property
    def searches_clip(self) -> bool:
        """Whether the clip is looked for after each validation."""
        return self.clip == "auto"

    def clip_range(self) -> tuple[float, float] | None:
        """(β, ω) of `clip`; None where there is none or it is searched for."""
        if self.clip is None or self.searches_clip:
            return None
        try:
            beta, omega = (float(part) for part in self.clip.split(","))
        except ValueError:
            raise InputError(
                f"`clip` {self.clip!r} is neither auto nor of the form 0.45,0.95"
            ) from None
        return checks.clip(beta, omega)

    @property
    def first_clip(self) -> tuple[float, float] | None:
        """The clip a run begins with: its own, and where that is searched for, none at all."""
        return self.clip_range() or (WHOLE if self.searches_clip else None)

    @property
    def effective_block_size(self) -> int:
        """L' of the model to train, of several the largest: 1 for AR, L for MDLM."""
        objective = OBJECTIVES.find(self.objective)
        return objective.block_size(self.length, max(size for size, _ in self._stages()))

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The block sizes that steps have, ascending."""
        if OBJECTIVES.has(self.objective, "any_blocks"):
            return tuple(size for size, _ in self._stages())
        return (self.effective_block_size,)

    @property
    def block_shares(self) -> list[float]:
        """The share of the steps that each of `block_sizes` has."""
        return [share for _, share in self._stages()]

    @property
    def trained_sizes(self) -> tuple[int, ...]:
        """The block sizes the model is for: of those it grew through, the last.

        What also trains the clean stream trains blocks of 1.
        """
        sizes = self.block_sizes[-1:] if self.grow else self.block_sizes
        if OBJECTIVES.has(self.objective, "shifts"):
            sizes = tuple(sorted({1, *sizes}))
        return sizes


def as_typed(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
