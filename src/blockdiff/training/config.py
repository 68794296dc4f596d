"""What a training run can be told; also the command line's and the YAML files' vocabulary.

Imports nothing heavy, so that `blockdiff train --help` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from blockdiff.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        out: Folder of the run: model, tokenizer, metrics and checkpoints.
        data: Corpus: pydoc, files (txt, jsonl, parquet; .xz and .gz too), a folder, or a hub id,
            @revision after it or not.
        validation_data: Corpus to validate on; by default documents held out of data.
        validation_split: Split of a hub data set to validate on: of validation_data, or of data.
        validation_fraction: Share of the text held out when neither is given.
        text_column: Column of JSON lines, Parquet or a hub data set that holds the text.
        split: Split of a hub data set.
        subset: Subset (configuration) of a hub data set.
        detokenizer: What undoes a benchmark's own marks: none, wikitext, ptb, lm1b, lambada or
            scientific.
        streaming: Read a hub data set as it is needed, keeping nothing on disk.
        tokenizer: Folder or hub id of a tokenizer; by default a BPE is trained on the corpus.
        vocab_size: Size of the trained BPE.
        bos: Put a beginning-of-text token before each document.
        across_documents: Let windows run across documents; otherwise pad at each document's end.
        objective: bd3lm, mdlm (block size = length), sedd or ar.
        length: Context L in tokens.
        block_size: Block size L' of bd3lm.
        preset: Network size: nano, micro, small or medium.
        init_from: Model folder, hub id or starter to start from, for example an AR model of this
            package; of a run's folder the weights and their average are both carried on.
        adaln: Give the network adaptive layer norms, as the paper does.
        time_conditioning: Feed the network the noise level; sedd always does.
        initial_shift: Standard deviation of their shifts at initialisation.
        estimator: How masks are drawn: exact_k, paired, bernoulli, d3pm, bell, clipped or
            clipped_redraw (redraws masks until their share lies in the clip).
        schedule: Noise schedule of bernoulli and d3pm.
        timesteps: Time steps T of d3pm.
        clip: Mask rates "β,ω" of clipped, for example 0.45,0.95; or auto, to search for the clip
            of least variance after each validation.
        steps: Optimizer steps.
        minutes: Stop after this many minutes of training, however many steps are left; 0 is never.
        batch_size: Windows per step, over all processes: the run is the same on any number.
        accumulate: Micro-batches each process's part of a step is cut into.
        lr: Learning rate.
        lr_schedule: constant, linear or cosine, after the warm-up.
        warmup: Warm-up steps.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Gradient norm to clip at.
        dropout: Dropout.
        ema: Decay of the weights' moving average, which is what is evaluated and saved; 0 is off.
        precision: auto, float32 or bf16 (autocast); auto measures which is faster.
        backend: Attention: auto, dense, blockwise or flex.
        compile: Compile the layers with torch.compile.
        seed: Seed of weights, data order, masks and dropout.
        workers: Data loading processes.
        log_every: Steps between log lines.
        eval_every: Steps between validations; 0 validates at the end only.
        eval_windows: Windows validated on; 0 is all of them.
        eval_draws: Noised copies per window where masks cannot be enumerated.
        save_every: Steps between checkpoints.
        report_to: Where metrics go beside metrics.jsonl: tensorboard, wandb, or none.
        resume: Continue the run in out from its last checkpoint.
        overwrite: Replace the run in out.
    """

    out: str = "runs/train"
    data: str = "pydoc"
    validation_data: str | None = None
    validation_split: str | None = None
    validation_fraction: float = 0.05
    text_column: str = "text"
    split: str = "train"
    subset: str | None = None
    detokenizer: str = "none"
    streaming: bool = False
    tokenizer: str | None = None
    vocab_size: int = 2048
    bos: bool = False
    across_documents: bool = True
    objective: str = "bd3lm"
    length: int = 128
    block_size: int = 4
    preset: str = "nano"
    init_from: str | None = None
    adaln: bool = True
    time_conditioning: bool = False
    initial_shift: float = 0.0
    estimator: str = "exact_k"
    schedule: str = "linear"
    timesteps: int = 1000
    clip: str | None = None
    steps: int = 1000
    minutes: float = 0.0
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-4
    lr_schedule: str = "constant"
    warmup: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    ema: float = 0.9999
    precision: str = "auto"
    backend: str = "auto"
    compile: bool = False
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_windows: int = 256
    eval_draws: int = 4
    save_every: int = 500
    report_to: str = "tensorboard"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        for name in ("vocab_size", "length", "block_size", "steps", "batch_size", "accumulate",
                     "log_every", "save_every", "eval_draws", "timesteps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("minutes", "warmup", "workers", "eval_every", "eval_windows",
                     "max_grad_norm", "weight_decay", "initial_shift"):  # fmt: skip
            if getattr(self, name) < 0:
                raise InputError(f"--{name} is {getattr(self, name)}; it must not be negative")
        if self.lr <= 0:
            raise InputError(f"--lr is {self.lr}; it must be above 0")
        for name in ("dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"--{name} {getattr(self, name)!r} is unknown; choose one of "
                    f"{', '.join(choices)}"
                )
        if self.batch_size % self.accumulate:
            raise InputError(
                f"--batch_size {self.batch_size} cannot be cut into {self.accumulate} equal "
                "micro-batches; make it a multiple of --accumulate"
            )
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other; choose one")
        if self.objective == "bd3lm" and self.length % self.block_size:
            raise InputError(
                f"block size {self.block_size} does not divide length {self.length}; "
                "choose a divisor"
            )
        if self.clip_range() is None and not self.searches_clip and "clipped" in self.estimator:
            raise InputError(
                f"--estimator {self.estimator} needs --clip, for example 0.45,0.95, or auto"
            )
        if self.time_conditioning and not self.adaln:
            raise InputError("--time_conditioning needs --adaln: it is adaLN that reads the time")

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
                f"--clip {self.clip!r} is neither auto nor of the form 0.45,0.95"
            ) from None
        if not (0 <= beta <= omega <= 1 and omega > 0):
            raise InputError(f"--clip {self.clip} must satisfy 0 <= β <= ω <= 1, ω > 0")
        return beta, omega

    @property
    def effective_block_size(self) -> int:
        """L' of the model to train: 1 for AR, L for MDLM."""
        sizes = {"ar": 1, "mdlm": self.length, "sedd": self.length}
        return sizes.get(self.objective, self.block_size)


CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("bd3lm", "mdlm", "sedd", "ar"),
    "preset": ("nano", "micro", "small", "medium"),
    "estimator": (
        "exact_k",
        "paired",
        "bernoulli",
        "d3pm",
        "bell",
        "clipped",
        "clipped_redraw",
    ),
    "schedule": ("linear", "cosine", "square", "square_root", "logarithmic"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "precision": ("auto", "float32", "bf16"),
    "backend": ("auto", "dense", "blockwise", "flex"),
}

# What a resumed run may be told anew: it changes what is watched and for how long, not what runs.
RESUMABLE = frozenset(
    {"out", "steps", "minutes", "resume", "overwrite", "workers", "log_every", "eval_every",
     "eval_windows", "eval_draws", "save_every", "report_to"}
)  # fmt: skip

CONFIG_FILE = "run.json"


def save_config(config: TrainConfig, folder: Path) -> None:
    """Writes the resolved configuration beside the weights."""
    text = json.dumps(asdict(config), indent=2, ensure_ascii=False)
    temporary = folder / f".{CONFIG_FILE}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG_FILE)


def load_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`; raises `InputError` when there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds no run ({CONFIG_FILE} is missing); start one without --resume"
        )
    try:
        return TrainConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} does not describe a run: {error}") from None


def merge_resumed(asked: TrainConfig) -> TrainConfig:
    """The stored configuration of the run in `asked.out`, with what may be told anew.

    Options left at their defaults are the run's own. Raises `InputError` when an option that
    shapes the run was given another value.
    """
    stored = load_config(Path(asked.out))
    default = TrainConfig()
    changed = {}
    for field in fields(TrainConfig):
        value = getattr(asked, field.name)
        if field.name in ("out", "minutes", "resume", "overwrite"):
            changed[field.name] = value
        elif value not in (getattr(default, field.name), getattr(stored, field.name)):
            if field.name not in RESUMABLE:
                raise InputError(
                    f"the run in {asked.out} has --{field.name} "
                    f"{getattr(stored, field.name)}, not {value}; leave the option out to resume"
                )
            changed[field.name] = value
    return TrainConfig(**{**asdict(stored), **changed})
