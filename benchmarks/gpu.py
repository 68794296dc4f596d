"""Checks and times the package on a GPU, and prints one short table last.

    python benchmarks/gpu.py [--out FILE] [--minutes 9]
    python benchmarks/gpu.py --device cpu --smoke       the same minutely, half a minute

Needs torch, transformers, accelerate, safetensors, psutil and rich, and installs nothing: the tree
around this file is what is measured. A row is one question. What fails is a row with its error:
rows run in a process of their own, which goes on with the next one when a row kills it. `settles`
names the expectations of `EXPECTED` that a row holds or breaks.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from dataclasses import replace as change
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
if "--into" in sys.argv:  # the parent needs none of it, and starts at once
    import torch
    import transformers
    from torch import distributed
    from torch._dynamo.utils import counters
    from torch.distributed.device_mesh import init_device_mesh
    from torch.profiler import ProfilerActivity, profile

    import blockdiff
    from adapted.families import MASK, tiny
    from blockdiff import objectives
    from blockdiff.apps.benchmark import works
    from blockdiff.apps.benchmark.compare import processor_name, product_rate, timed
    from blockdiff.apps.benchmark.options import GPT2_BF16, BenchmarkOptions
    from blockdiff.apps.benchmark.report import body_parameters, useful_flops
    from blockdiff.attention import attend, flex, make_mask
    from blockdiff.device import choose_device
    from blockdiff.errors import InputError
    from blockdiff.estimators import make_estimator
    from blockdiff.evaluation.likelihood import likelihood
    from blockdiff.layout import BlockLayout
    from blockdiff.models import loss, loss_by_position
    from blockdiff.models.adapting import adapt
    from blockdiff.models.config import PRESETS
    from blockdiff.models.dit import DiT
    from blockdiff.models.loss import subs_nll
    from blockdiff.models.released_dit import released_config, released_weights
    from blockdiff.models.weights import Linear, convert
    from blockdiff.noising import stratified_noise
    from blockdiff.sampling import recorded
    from blockdiff.sampling.engine import Engine
    from blockdiff.sampling.generate import generate_tokens, stream_tokens
    from blockdiff.sampling.options import SamplingOptions
    from blockdiff.training.ema import Average
    from blockdiff.training.parallel import gathered, shard_layers, shard_like
    from helpers import GOLDEN, Operators, random_masks, random_tokens, read_golden, tiny_model

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
# What a reading of the code and of torch's made one expect on a GPU, before the code was mended.
EXPECTED = {
    "G1": "CUDA graphs break on a prompt longer than a block",
    "G2": "flex compiles for each prompt length, then falls back",
    "G3": "compiled layers break inside the rotation",
    "G4": "flex masks made while sampling cannot be trained with",
    "G5": "folded weights are copied into a graph at each replay",
    "G6": "a CUDA graph for every number of rows and tokens",
    "G7": "flex has no kernel for heads under 16",
    "G8": "rates measured on equal numbers, or on a first call",
    "S1": "the loss is thousands of launches and hundreds of waits",
    "S2": "sampling is bound by launches and waits",
    "S3": "a document mask for each layer",
    "S4": "AR and MDLM run through flex where SDPA is faster",
    "S5": "int8 widens the weight at each call",
    "S6": "validation in float32",
    "S7": "blockwise rounds scores to bf16",
    "S8": "the average makes the host wait at each step",
    "D1": "the average of a compiled model runs the raw weights",
    "D2": "tables made while sampling cannot be trained with",
    "D3": "FSDP2 shards the network as one unit",
    "D6": "load leaves the model on the CPU",
}
ROW_SECONDS = 120  # a row that takes longer is given up
# What is aimed at: (what, the row it is read off, which of its figures, at least).
AIMS = (
    ("training, share of the bf16 rate", "train, flex, compiled", "share", 0.4),
    ("attention, flex over dense", "attention, both streams", "flex_over_dense", 5.0),
    ("one row, tokens/s", "sample 1, ours", "tokens_per_second", 300.0),
    ("64 rows, tokens/s", "sample 64, ours", "tokens_per_second", 8000.0),
)


@dataclass
class Found:
    """What a row says; `ok` where it can be right or wrong. `figures` are for the JSON."""

    text: str
    ok: bool | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    name: str
    settles: str
    run: Callable[[], Found]


# the parent: starts the rows' process, again where one killed it, and prints what was found


def main() -> None:
    asked = _arguments()
    if asked.into:
        return work(asked)
    begin = time.time()
    until = begin + 60 * asked.minutes
    parts = [f"{i}/{asked.jobs}" for i in range(asked.jobs)]
    with ThreadPoolExecutor(asked.jobs) as pool:  # what must be right; then alone what is timed
        found = [*pool.map(partial(follow, asked, until), parts), follow(asked, until, "timed")]
    head = next((head for head, _ in found if head), {})
    rows = [row for _, rows in found for row in rows]
    record = head | {"seconds": time.time() - begin, "expected": EXPECTED, "rows": rows}
    record["aims"] = aims([] if asked.smoke else rows)
    print(table(record), flush=True)
    if asked.out:
        path = Path(asked.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


def follow(
    asked: argparse.Namespace, until: float, part: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a part of the rows tells of the machine, and found; its process ends with some."""
    rows: list[dict[str, Any]] = []
    head: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "rows.jsonl"
        while True:
            before = len(rows)
            again = [sys.executable, __file__, *sys.argv[1:], "--into", str(into), "--part", part]
            child = subprocess.Popen([*again, "--begin", str(len(rows)), "--until", str(until)])
            try:
                code: int | str = child.wait(max(until + 15 - time.time(), 1))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                code = f"none after {asked.minutes:g} minutes"
            lines = into.read_text().splitlines() if into.exists() else []
            told = [json.loads(line) for line in lines]
            head = next((x["head"] for x in told if "head" in x), head)
            rows = [x["row"] for x in told if "row" in x]
            begun = [x["begin"] for x in told if "begin" in x]
            if len(begun) > len(rows):  # the row that ended its process
                lost = begun[-1] | {"ok": False, "text": f"FAILS: exit code {code}"}
                with into.open("a") as file:
                    print(json.dumps({"row": lost}), file=file)
                rows.append(lost)
            if any("end" in x for x in told) or isinstance(code, str):
                return head, rows
            if code == 2 and not rows:  # one line was said
                os._exit(2)
            if len(rows) == before:
                return head, [
                    *rows, {"name": "start", "ok": False, "text": f"FAILS: exit code {code}"}
                ]  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--smoke", action="store_true", help="everything minutely")
    parser.add_argument("--minutes", type=float, default=9, help="rows after that are left out")
    parser.add_argument("--out", help="where the JSON goes; by default benchmarks/results/gpu.json")
    parser.add_argument("--only", nargs="*", help="rows whose name begins with one of these")
    parser.add_argument("--jobs", type=int, default=1, help="processes of what must be right")
    for hidden in ("--into", "--begin", "--until", "--part"):  # for the rows' process
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.out is None and asked.device != "cpu" and not asked.smoke and not asked.only:
        asked.out = str(RESULTS)
    return asked


def aims(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is aimed at, and what was measured of it; None where nothing was."""
    figures = {row["name"]: row.get("figures", {}) for row in rows}
    return {
        what: {"at_least": least, "measured": figures.get(name, {}).get(figure)}
        for what, name, figure, least in AIMS
    }


def table(record: dict[str, Any]) -> str:
    """Short: what failed, what was measured, what was aimed at; what is right is counted."""
    rows = record["rows"]
    right = [row for row in rows if row["ok"]]
    lines = [
        "",
        f"=== {record.get('device')}, torch {record.get('torch')}; "
        f"{record['seconds']:.0f} s; {'smoke, no figures' if record.get('smoke') else 'full'}",
    ]
    lines.append(f"right: {len(right)} rows, {_names(right)}")
    for row in sorted(rows, key=lambda row: row["ok"] is None):
        if not row["ok"]:
            lines.append(f"{row['name']:34.34s} {row.get('settles', ''):9s} {row['text'][:105]}")
    for what, found in record["aims"].items():
        measured = found["measured"]
        mark = "unmeasured" if measured is None else f"{measured:,.2f}"
        reached = "" if measured is None else " ✓" if measured >= found["at_least"] else " ✗"
        lines.append(f"aim: {what}: {mark}, at least {found['at_least']:,g}{reached}")
    return "\n".join(lines)


def _names(rows: list[dict[str, Any]]) -> str:
    return " ".join(dict.fromkeys(" ".join(row.get("settles", "") for row in rows).split()))


# the rows' process


def work(asked: argparse.Namespace) -> None:
    """Runs the rows from number `begin` on, one JSON line before and one after each."""
    with open(asked.into, "a") as file:

        def tell(**what: Any) -> None:
            print(json.dumps(what), file=file, flush=True)

        try:
            setting = Setting(asked.device, asked.smoke)
        except InputError as error:
            print(f"gpu.py: {error}", file=sys.stderr)
            sys.exit(2)
        tell(head=setting.head())
        part = getattr(asked, "part", None) or "timed"
        rows = [
            row for row in rows_of(setting, part) if row.name.startswith(tuple(asked.only or [""]))
        ]
        for row in rows[int(asked.begin) :]:
            known = {"name": row.name, "settles": row.settles}
            tell(begin=known)
            begin, left = time.time(), float(asked.until) - time.time()
            try:
                if left < 5:
                    found = Found("left out: no time")
                else:
                    with setting.fresh(), at_most(min(ROW_SECONDS, left)):
                        found = row.run()
            except Exception as error:
                found = Found(
                    f"FAILS: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )
                found.ok = False
            finished = known | asdict(found) | {"seconds": round(time.time() - begin, 2)}
            if setting.cuda and "peak_gib" not in found.figures:
                finished["figures"]["peak_gib"] = setting.peak()
            tell(row=finished)
            print(f"{row.name:40s} {found.text}", flush=True)
            if setting.broken():
                sys.exit(3)  # CUDA takes no more work in this process; the next goes on
        tell(end=True)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` after so many seconds, where the system has alarms."""

    def ring(*unused: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, ring)
        signal.alarm(max(1, int(seconds)))
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)


class Setting:
    """The device, and the sizes of everything."""

    def __init__(self, device: str, smoke: bool) -> None:
        self.device, self.smoke = choose_device(device), smoke
        self.cuda = self.device.type == "cuda"
        if self.cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if smoke:  # inductor takes half a minute on a CPU; what it is handed is the same
            compile_layers = DiT.compile_layers
            DiT.compile_layers = lambda model: compile_layers(model, "eager")  # type: ignore
        sizes: Any = ("nano", 64, 32, 16, 2) if smoke else ("small", 50258, 1024, 16, 16)
        self.train = BenchmarkOptions(
            *sizes, precision="bf16", tokens=4 if smoke else 128, device=str(self.device)
        )
        self.sample = change(self.train, block_size=4)
        self.rows = (1, 2, 3) if smoke else (1, 16, 64)
        self.repeats = 1 if smoke else 7
        self.rate: float | None = None  # GFLOP/s of bf16 products

    def head(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.cuda else processor_name()
        return {
            "device": name, "torch": torch.__version__, "cuda": torch.version.cuda,
            "transformers": transformers.__version__, "python": platform.python_version(),
            "smoke": self.smoke, "train": asdict(self.train), "sample": asdict(self.sample),
        }  # fmt: skip

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Nothing compiled, no memory held by the row before."""
        torch._dynamo.reset()
        flex.compiled.cache_clear()
        if self.cuda:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield

    def broken(self) -> bool:
        """Whether an error has left the device unusable for this process."""
        try:
            if self.cuda:
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def peak(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> list[float]:
        """Of each repeat, after two calls that are thrown away (G8)."""
        for _ in range(1 if self.smoke else 2):
            run()
        return [timed(run, self.device) for _ in range(repeats or self.repeats)]

    def tiny(self, **settings: Any) -> Any:
        """A small network in which no weight is idle; its heads are wide enough for flex."""
        sizes = {"vocab_size": 40, "length": 32, "hidden_size": 64, "num_attention_heads": 2}
        return tiny_model(**(sizes | settings)).to(self.device)

    def bf16_rate(self) -> float:
        """GFLOP/s of random bf16 products, measured once."""
        if self.rate is None:
            size = 256 if self.smoke else None
            self.rate = product_rate(self.device, torch.bfloat16, size)
        return self.rate


def spread(seconds: list[float]) -> str:
    low, middle, high = (1e3 * x for x in (min(seconds), median(seconds), max(seconds)))
    return f"{middle:.2f} ms ({low:.2f}–{high:.2f})"


def verdict(gap: float, limit: float, more: str = "") -> Found:
    return Found(f"largest gap {gap:.1e}{more}", gap <= limit, {"gap": gap})


def rows_of(s: Setting, part: str) -> list[Row]:
    """Every N-th of what must be right, from number i on ("i/N"), or what is "timed"."""
    rows: list[Row] = []

    def add(name: str, settles: str, run: Callable[..., Found], *given: Any) -> None:
        rows.append(Row(name, settles, partial(run, s, *given)))

    if part != "timed":
        add_checks(s, add)
        first, every = map(int, part.split("/"))
        return rows[first::every]
    add_timed(s, add)
    return rows


def add_checks(s: Setting, add: Callable[..., None]) -> None:
    backends = ("dense", "blockwise", "flex")
    for backend in backends:
        add(f"golden tensors, {backend}", "", golden, backend)
    for backend in backends[1:]:
        add(f"training against dense, {backend}", "S3", against_dense, backend)
    add("narrow heads", "G7", narrow_heads)
    add("attention in bf16", "S7", attention_in_bf16)
    for tokens in (3, 9):  # in blocks of 4: without a prefill and with one
        add(f"graphs against none, prompt of {tokens}", "G1 G5 G6", graphs_against_none, tokens)
    for kind, backend in (("ar", "auto"), ("bd3lm", "auto"), ("bd3lm", "flex")):
        add(
            f"train after sampling, {kind}, {backend}", "D2 G4", train_after_sampling, kind, backend
        )
    for family in ADAPTED:
        add(f"adapted {family} against a CPU", "", adapted_against_cpu, family)
    add("orders at temperature 0 against a CPU", "", orders_against_cpu)
    add("average of a compiled model", "D1", average_of_compiled)
    add("FSDP2 of one process", "D3", sharded)
    add("text on the host, model by load", "D6", loaded)
    for compiled in (False, True):
        add(f"ten prompt lengths{_how(compiled)}", "G2", recompiles, compiled)
    add("ten numbers of prompts", "G2", recompiles_of_rows)
    add("one step compiled", "G3", graphs_of_a_step)
    for name, changed in {
        "plain": {}, "top-p": {"top_p": 0.9}, "threshold": {"sampler": "threshold"},
        "ancestral, paper's stop": {"sampler": "ancestral", "steps": 8, "stop": "paper"},
    }.items():  # fmt: skip
        add(f"host waits, sampling, {name}", "S2", waits_of_sampling, changed)
    add("host waits, training", "S1 S8", waits_of_training)


def add_timed(s: Setting, add: Callable[..., None]) -> None:
    """First what is aimed at, then the rest, while there is time."""
    add("rate of products", "G8", rates)
    add("attention, both streams", "", attention)
    add("train, flex, compiled", "S1", train, "ours", {"compile": True}, "flex")
    one, *some, many = s.rows
    for count in (one, many):
        add(f"sample {count}, ours", "S2 G6", sample, count, "ours")
        add(f"sample {count}, gpt2 of transformers", "", sample, count, GPT2_BF16)
        add(f"sample {count}, ar", "", sample, count, "ar")
    add(f"sample {one}, adapted", "", sample_adapted, one)
    add(f"sample {one}, its base model by transformers", "", sample_base, one)
    add(f"sample {one}, ours, no graphs", "S2", sample, one, "ours", {}, False)
    add("train, flex", "", train, "ours", {}, "flex")
    add("train, ar, compiled", "S4", train, "ar", {"compile": True}, "auto")
    add("train, dense", "", train, "ours", {}, "dense")
    add("loss alone", "S1", loss_alone)
    add("attention of AR, sdpa over flex", "S4", attention_of_ar)
    add("masks of documents", "S3", masks_of_documents)
    add("an update of the average", "S8", update_of_average)
    add("operators of a step", "S2 G5", operators_of_a_step, True)
    add(f"sample {one}, int8", "S5", sample, one, "int8")
    add("int8 product", "S5", int8_product)
    add("validation, bf16 and float32", "S6", validation)
    for count in some:
        add(f"sample {count}, ours", "S2 G6", sample, count, "ours")
        add(f"sample {count}, adapted", "", sample_adapted, count)
        add(f"sample {count}, its base model by transformers", "", sample_base, count)
    add(f"sample {one}, ours, compiled", "S2 G6", sample, one, "ours", {"compile": True})
    add(f"sample {one}, adapted, no graphs", "", sample_adapted, one, False)
    add("train, ar", "S4", train, "ar", {}, "auto")
    add("train, flex, checkpointed", "", train, "ours", {"checkpoint_activations": True}, "flex")
    add("operators of a step, no graphs", "S2 G5", operators_of_a_step, False)
    add(f"sample {many}, ours, compiled", "S2 G6", sample, many, "ours", {"compile": True})
    add(f"sample {many}, ours, no graphs", "S2", sample, many, "ours", {}, False)
    for count in some:
        add(f"sample {count}, gpt2 of transformers", "", sample, count, GPT2_BF16)
        add(f"sample {count}, ar", "", sample, count, "ar")
    add("train, blockwise", "", train, "ours", {}, "blockwise")
    add("train, dense, compiled", "", train, "ours", {"compile": True}, "dense")
    for kind in ("naive", "naive, bf16 autocast"):
        add(f"train, {kind}, batch 4", "", train, kind, {"batch_size": 4}, "auto")


def _how(compiled: bool) -> str:
    return ", compiled" if compiled else ""


# what must be right


def rates(s: Setting) -> Found:
    size = 256 if s.smoke else None
    random = s.bf16_rate()
    ones = product_rate(s.device, torch.bfloat16, size, torch.ones)
    float32 = product_rate(s.device, torch.float32, size)
    source = torch.randn(2**20 if s.smoke else 2**28, device=s.device)
    source.sum()
    read = source.nbytes / min(timed(source.sum, s.device) for _ in range(4)) / 1e9
    figures = {"bf16_gflops": random, "of_ones": ones, "float32_gflops": float32, "read": read}
    text = f"bf16 {random / 1e3:,.1f} TFLOP/s (of ones {ones / 1e3:,.1f})"
    return Found(f"{text}, float32 {float32 / 1e3:,.1f}, reading {read:,.0f} GB/s", None, figures)


def golden(s: Setting, backend: str) -> Found:
    """Logits and losses computed with the paper's public code, float32."""
    gaps = {}
    for path in sorted(set(GOLDEN.glob("*.safetensors")) - {GOLDEN / "sedd_loss.safetensors"}):
        config, weights, io = read_golden(path.stem)
        if config.get("time_conditioning"):
            config["parameterization"] = "sedd"
        model: Any = DiT(released_config(config, weights)).eval()
        model.load_state_dict(released_weights(weights))
        model, io = model.to(s.device), {name: x.to(s.device) for name, x in io.items()}
        model.config.score = False  # the file holds cross entropies for SEDD's network too
        x_t, x_0 = io.get("xt", io["x0"]), io["x0"]
        call = partial(
            model, x_t, x_0=x_0 if model.config.block_size < x_0.shape[1] and "xt" in io else None,
            sigma=io.get("sigma"), backend=backend,
        )  # fmt: skip
        with torch.no_grad():
            found = [(call().logits, io["logits"])]
            if "masked_nll" in io:
                at = x_t == model.config.mask_token_id
                found.append((call(at=at, targets=x_0[at]).nll, io["masked_nll"][at]))
        gaps[path.stem] = max((a - b).abs().max().item() for a, b in found)
    worst = max(gaps, key=lambda name: gaps[name])
    return verdict(gaps[worst], 1e-4, f" ({worst}) of {len(gaps)} files")


def against_dense(s: Setting, backend: str) -> Found:
    """Gradients of one step, then the losses of three, in float32, with documents and without."""
    if backend == "flex" and not s.cuda:
        return Found("flex has no backward on a CPU")
    shapes = [(32, 4, True), (24, 8, False)]
    if not s.smoke:
        shapes = [(100, 4, True), (1000, 8, False)]
    gaps = []
    for length, size, many in shapes:
        start = s.tiny(length=length, block_size=size).train()
        x_0 = random_tokens(start, 2, length).to(s.device)
        owner = torch.arange(length, device=s.device).expand(2, -1) // 37 if many else None
        layout = BlockLayout(length, size, documents=owner)
        found = []
        for name in (backend, "dense"):
            model = copy.deepcopy(start)
            model.attention_backend = name
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            losses = []
            for step in range(3):  # rounding grows tenfold with each of the next
                noise = stratified_noise(2, layout, torch.Generator(s.device).manual_seed(step))
                maskable = objectives.maskable_positions(x_0, True, owner)
                mask = model.config.mask_token_id
                draw = make_estimator("exact_k")(x_0, layout, noise, maskable, mask)
                loss = objectives.bd3lm(model, x_0, draw, layout).sum() / maskable.sum()
                loss.backward()
                losses.append(loss.detach())
                if step == 0:
                    first = torch.cat([p.grad.flatten() for p in model.parameters()])
                optimizer.step()
                optimizer.zero_grad()
            found.append((first, torch.stack(losses)))
        (gradient, losses), (expected, curve) = found
        gaps.append(((gradient - expected).abs().max() / expected.abs().max()).item())
        gaps.append(((losses - curve).abs() / curve).max().item())
    more = f" of {len(shapes)} layouts; of gradients {max(gaps[::2]):.1e}"
    return verdict(max(gaps), 1e-3, more)


def narrow_heads(s: Setting) -> Found:
    """Heads of width 8, for which flex has no kernel: "auto" takes another backend."""
    model = s.tiny(hidden_size=16)
    x_0 = random_tokens(model, 2, 32).to(s.device)
    with torch.no_grad():
        auto, dense = (model(x_0, x_0=x_0, backend=b).logits for b in ("auto", "dense"))
    return verdict((auto - dense).abs().max().item(), 1e-3)


def attention_in_bf16(s: Setting) -> Found:
    """Errors of peaked attention in bf16, relative to float64: within twice that of SDPA."""
    layout = BlockLayout(64 if s.smoke else 512, 16)
    torch.manual_seed(0)
    exact = [3 * torch.randn(1, 2, 2 * layout.length, 64, device=s.device) for _ in "qkv"]
    rounded = [x.to(torch.bfloat16) for x in exact]

    def attended(backend: str, leaves: list[Any]) -> Any:
        return attend(*leaves, make_mask(layout, "two_stream", backend, s.device)).double()

    with torch.no_grad():
        expected = attended("dense", [x.double() for x in rounded])
        errors = {
            backend: ((attended(backend, rounded) - expected).norm() / expected.norm()).item()
            for backend in ("dense", "blockwise", "flex")
        }
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Found(text, max(errors.values()) <= 2 * errors["dense"], {"errors": errors})


def graphs_against_none(s: Setting, tokens: int) -> Found:
    """The same tokens, in rows that end one after another, and after a weight changed."""

    def written(model: Any) -> Any:
        *_, step = stream_tokens(model, [[1 + i] * (tokens + i) for i in range(3)], options)
        return step.tokens

    options = SamplingOptions(max_new_tokens=6 if s.smoke else 20, stop="none")
    model = s.tiny()
    plain, compiled = copy.deepcopy(model), copy.deepcopy(model)
    plain.graphs = False
    compiled.compile_layers()
    same = []
    for _ in range(2):
        expected = written(plain)
        for one in (model, compiled):
            same += [torch.equal(written(one), expected) for _ in range(1 if s.smoke else 3)]
        with torch.no_grad():
            for one in (model, plain, compiled):
                one.layers[0].attention_out.weight.mul_(-1.5)
    return Found(f"the same: {same}", all(same))


def train_after_sampling(s: Setting, kind: str, backend: str) -> Found:
    """What a sampler keeps (tables, masks) may take part in a backward."""
    if backend == "flex" and not s.cuda:
        return Found("flex has no backward on a CPU")
    model = s.tiny(causal=kind == "ar")
    model.attention_backend = backend
    generate_tokens(model, [[1] * 33], SamplingOptions(max_new_tokens=2))  # prefills 32 tokens
    x_0 = torch.ones(2, 32, dtype=torch.int64, device=s.device)
    with torch.inference_mode():
        model(x_0, x_0=None if kind == "ar" else x_0)
    maskable = objectives.maskable_positions(x_0)
    if kind == "ar":
        nats = objectives.ar(model.train(), x_0, maskable)
    else:
        layout = model.config.layout
        noise = stratified_noise(2, layout, torch.Generator(s.device).manual_seed(0))
        draw = make_estimator("exact_k")(x_0, layout, noise, maskable, model.config.mask_token_id)
        nats = objectives.bd3lm(model.train(), x_0, draw)
    nats.sum().backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return Found("a gradient, finite" if finite else "not finite", finite)


# Base models that differ in what attention is asked: grouped heads; a soft cap and windows in some
# layers; a sink in each head; keys wider than values. Heads are wide enough for flex.
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("block", {}),
    "gemma2": (
        "causal",
        {
            "query_pre_attn_scalar": 11, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": (
        "block",
        {
            "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
            "num_experts_per_tok": 2, "num_local_experts": 4,
        },
    ),
    "deepseek_v3": (
        "causal",
        {
            "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
            "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
            "v_head_dim": 16, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip


def adapted_against_cpu(s: Setting, family: str) -> Found:
    """Logits and gradients of an adapted model, against the whole mask on a CPU."""
    clean, own = ADAPTED[family]
    drop = {"head_dim"} if family == "deepseek_v3" else set()
    wide = {} if drop else {"head_dim": 16}
    lm = tiny(family, drop, hidden_size=64, num_attention_heads=4, **(wide | own))
    prediction = "shift" if clean == "causal" else "same"
    alone = adapt(lm, mask_token_id=MASK, block_size=4, clean=clean, prediction=prediction)
    there = copy.deepcopy(alone).to(s.device)
    x_0 = torch.randint(MASK, (2, 32), generator=torch.Generator().manual_seed(1))
    x_t = random_masks(x_0, MASK)
    found = []
    for model, backend, device in ((alone, "dense", "cpu"), (there, "auto", s.device)):
        logits = model(x_t.to(device), x_0.to(device), backend=backend).logits
        (logits.float().log_softmax(-1)[..., 3]).sum().backward()
        pairs = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        found.append((logits.detach().cpu(), {name: grad.cpu() for name, grad in pairs}))
    (expected, slopes), (logits, gradients) = found
    gap = ((logits - expected).abs().max() / expected.abs().max()).item()
    of_gradients = max(
        ((gradients[name] - slope).norm() / slope.norm().clamp(min=1e-3)).item()
        for name, slope in slopes.items()
    )
    return verdict(max(gap, of_gradients), 2e-3, f"; of gradients {of_gradients:.1e}")


def orders_against_cpu(s: Setting) -> Found:
    """Greedy texts of every order and guide, rows of several lengths, against a CPU's."""
    wishes: dict[str, dict[str, Any]] = {
        "first_hitting": {}, "confidence": {"tokens_per_step": 2}, "threshold": {"threshold": 0.3},
        "margin": {"margin": 0.2}, "entropy": {"sampler": "entropy", "steps": 2},
        "entropy_bound": {"entropy_bound": 1.3}, "verified": {"sampler": "verified"},
        "editing": {"edit_threshold": 0.3, "threshold": 0.25},
        "guides": {"cfg_scale": 0.5, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
        "ancestral": {"sampler": "ancestral", "steps": 4}, "logprobs": {"logprobs": True},
    }  # fmt: skip
    sizes = {
        "vocab_size": 40,
        "length": 64,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "bos_token_id": 0,
    }
    causal = tiny_model(clean_stream="causal", block_sizes=(1, 4), **sizes)
    adapted = adapt(
        tiny("llama", hidden_size=64, head_dim=16), mask_token_id=MASK, block_size=4, clean="causal"
    )
    wrong = []
    for kind, model in (("block", tiny_model(**sizes)), ("causal", causal), ("adapted", adapted)):
        there = copy.deepcopy(model).to(s.device)
        for name, wish in wishes.items():
            if name == "verified" and kind == "block":
                continue
            options = SamplingOptions(
                max_new_tokens=12, stop="none", temperature=0, **({"seed": 1} | wish)
            )
            prompts = [[1 + i, 2, 3, 4, 5, 6, 7][: 2 + 2 * i] for i in range(3)]
            texts = [generate_tokens(one, prompts, options).tokens for one in (model, there)]
            if texts[0] != texts[1]:
                wrong.append(f"{kind} {name}")
    text = (
        f"not the same: {', '.join(wrong)}" if wrong else f"the same: {3 * len(wishes) - 1} texts"
    )
    return Found(text, not wrong)


def average_of_compiled(s: Setting) -> Found:
    """The moving average of a compiled model follows no raw weight, and its dropout is off."""
    model = s.tiny().train()
    for layer in model.layers:
        layer.dropout = 0.5
    model.compile_layers()
    average = Average(model, 0.9).eval()
    x_0 = random_tokens(model, 2, 32).to(s.device)
    with torch.no_grad():
        model(x_0, x_0=x_0)
        before = average.module(x_0, x_0=x_0).logits
        for parameter in model.parameters():
            parameter.add_(1.0)
        after = average.module(x_0, x_0=x_0).logits
    return verdict((after - before).abs().max().item(), 0.0)


def sharded(s: Setting) -> Found:
    """Loss and gradients of a network sharded by layer over one process, against the same alone."""
    kind = "nccl" if s.cuda else "gloo"
    if s.cuda:
        torch.cuda.set_device(s.device)
    distributed.init_process_group(kind, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        alone = s.tiny()
        parts = copy.deepcopy(alone)
        average = Average(parts, 0.9)
        shard_layers(parts, init_device_mesh(s.device.type, (1,)))
        shard_like(average.module, parts)
        x_0 = random_tokens(alone, 4, 32).to(s.device)
        layout, maskable = alone.config.layout, objectives.maskable_positions(x_0)
        noise = stratified_noise(4, layout, torch.Generator(s.device).manual_seed(0))
        draw = make_estimator("exact_k")(x_0, layout, noise, maskable, alone.config.mask_token_id)
        backend = "auto" if s.cuda else "blockwise"
        for model in (alone, parts):
            model.attention_backend = backend
            objectives.bd3lm(model, x_0, draw).sum().backward()
        gap = max(
            (
                (a.grad.full_tensor() - b.grad).abs().max() / b.grad.abs().max().clamp(min=1e-6)
            ).item()
            for a, b in zip(parts.parameters(), alone.parameters(), strict=True)
        )
        average.update_parameters(parts)
        with gathered(average.module):
            logits = average.module(x_0, x_0=x_0).logits
        gap = max(gap, (logits - alone(x_0, x_0=x_0).logits).abs().max().item())
    finally:
        distributed.destroy_process_group()
    return verdict(gap, 1e-3, f" over {kind}")


def loaded(s: Setting) -> Found:
    """`load` takes the GPU without being told; x_0 on the host is measured all the same."""
    model, tokenizer = blockdiff.load("starter")
    done = blockdiff.generate(model, "Return", tokenizer=tokenizer, max_new_tokens=4, seed=1)
    found = blockdiff.likelihood(
        model, torch.tensor([tokenizer.encode("The function returns")[:4]])
    )
    there = model.device.type == s.device.type or not s.cuda
    text = f"on {model.device}, wrote {done.texts[0]!r}, {found.nats_per_token:.3f} nats"
    return Found(text, there and 0 < found.nats_per_token < 20)


def int8_product(s: Setting) -> Found:
    """The product that reads 8 bits, against the same weights widened first; and its time."""
    wide, out = (128, 256) if s.smoke else (768, 3072)
    plain = Linear(wide, out).to(s.device)
    small = copy.deepcopy(plain)
    small.store("int8")
    plain.to(torch.bfloat16)
    x = torch.randn(4, wide, device=s.device, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = torch.nn.functional.linear(x.float(), small.dense().float(), small.bias.float())
        gap = ((small(x) - expected).norm() / expected.norm()).item()
        times = [s.seconds(partial(each, x)) for each in (plain, small)]
    return verdict(gap, 0.02, f"; bf16 {spread(times[0])}, int8 {spread(times[1])}")


@contextmanager
def fallbacks() -> Iterator[list[str]]:
    """The times torch gave compiling up, by its log."""
    found: list[str] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "recompile_limit" in record.getMessage():
                found.append(record.getMessage())

    reader, logger = Reader(), logging.getLogger("torch._dynamo")
    logger.addHandler(reader)
    try:
        yield found
    finally:
        logger.removeHandler(reader)


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def recompiles(s: Setting, compiled: bool) -> Found:
    """Graphs compiled for ten prompt lengths; none may be given up."""
    longest = 40 if s.smoke else 400
    model = s.tiny(length=longest + 24)
    if compiled:
        model.compile_layers()
    counts, begin = [], _graphs()
    with fallbacks() as given_up:
        for length in range(5, longest + 5, longest // 10):
            generate_tokens(model, [[1] * length], SamplingOptions(max_new_tokens=2, stop="none"))
            counts.append(_graphs() - begin)
    text = f"graphs after each: {counts}, given up {len(given_up)} times"
    return Found(text, not given_up, {"graphs": counts, "given_up": len(given_up)})


def recompiles_of_rows(s: Setting) -> Found:
    """Graphs compiled for prompts that come in tens, nines and so on: a server's day."""
    model, counts, begin = s.tiny(length=64), [], _graphs()
    with fallbacks() as given_up:
        for rows in range(1, 11):
            prompts = [[1] * (9 + rows)] * rows
            generate_tokens(model, prompts, SamplingOptions(max_new_tokens=2, stop="none"))
            counts.append(_graphs() - begin)
    text = f"graphs after each: {counts}, given up {len(given_up)} times"
    return Found(text, counts[-1] <= 4 and not given_up, {"graphs": counts})


def graphs_of_a_step(s: Setting) -> Found:
    """A layer is two graphs, before and after its attention, and no more."""
    options = change(s.train, preset="nano", vocab_size=64, length=32, batch_size=2, compile=True)
    begin = _graphs()
    counters["graph_break"].clear()
    works.training_step(options, str(s.device), "ours")()
    reasons = {" ".join(reason.split())[:60]: n for reason, n in counters["graph_break"].items()}
    layers = 5
    count = _graphs() - begin
    torch._dynamo.reset()
    text = f"{count} graphs for {layers} layers; {len(reasons)} kinds of break"
    return Found(text, count <= 2 * layers + 2, {"graphs": count, "breaks": reasons})


@contextmanager
def waiting(s: Setting) -> Iterator[Callable[[], int]]:
    """Counts how often the host waits: torch's own warnings on CUDA, else operators that would."""
    if not s.cuda:
        with Operators() as seen:
            yield lambda: len(seen.waits())
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield lambda: sum("synchroniz" in str(warning.message) for warning in told)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_of_sampling(s: Setting, changed: dict[str, Any]) -> Found:
    """A step of eight rows: at most two waits, by the device's count and by the engine's own."""
    wish = SamplingOptions(**({"max_new_tokens": 12, "stop": "none"} | changed))
    model = s.tiny().eval()
    counts = []
    for _ in range(2):  # the first makes tables and masks
        engine, counts = Engine(model), []
        for i in range(8):
            engine.admit([1] * (2 + i), wish)
        while engine.active:
            own = engine.waits
            with waiting(s) as count:
                engine.step()
            if engine.waits > own:  # not the prefill
                counts.append(count() if s.cuda else count() + engine.waits - own)
    text = f"{max(counts)} at most, {sum(counts) / len(counts):.1f} a step"
    # On a CPU, where nothing is waited for, top-p asks which tokens it has to draw anew.
    judged = s.cuda or not wish.top_p
    return Found(text, max(counts) <= 2 if judged else None, {"waits": counts})


def waits_of_training(s: Setting) -> Found:
    run = works.training_step(change(s.train, batch_size=2), str(s.device), "ours")
    run()
    with waiting(s) as count:
        run()
    return Found(f"{count()} a step", None, {"waits": count()})


# what is timed


def train(s: Setting, kind: str, changed: dict[str, Any], backend: str) -> Found:
    """Steps of the paper's network: forward, backward, clipping, AdamW."""
    if backend == "flex" and not s.cuda:
        backend = "blockwise"  # where flex has no backward
    wish = change(s.train, backend=backend, **changed)
    run = works.training_step(wish, str(s.device), kind)
    first = timed(run, s.device)
    taken = s.seconds(run, 1 if s.smoke else 5)
    tokens, flops = wish.batch_size * wish.length, useful_flops(wish)
    if kind == "ar":
        sizes = PRESETS[wish.preset]
        width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
        of_token = body_parameters(wish.preset) + width * (wish.vocab_size + layers * wish.length)
        flops = 6 * tokens * of_token
    share = flops / median(taken) / (1e9 * s.bf16_rate())
    text = f"{tokens / median(taken):,.0f} tokens/s, {spread(taken)}, {share:.1%} of the bf16 rate"
    text += f", {backend}, first step {first:.1f} s"
    if s.cuda:
        text += f", peak {s.peak():.1f} GiB"
    return Found(text, None, {
        "tokens_per_second": tokens / median(taken), "seconds": taken, "share": share,
        "first_step_seconds": first, "peak_gib": s.peak(), "backend": backend,
    })  # fmt: skip


@contextmanager
def evaluations(graphs: bool) -> Iterator[None]:
    """Recorded as graphs on CUDA, as by default, or nowhere."""
    before = recorded.DEVICES
    recorded.DEVICES = before if graphs else set()
    try:
        yield
    finally:
        recorded.DEVICES = before


def sample(
    s: Setting, count: int, kind: str, changed: dict[str, Any] | None = None, graphs: bool = True
) -> Found:
    """New tokens a second of `count` rows after a prompt of one token, weights in bf16."""
    with evaluations(graphs):
        return _sample(s, kind, change(s.sample, batch_size=count, **(changed or {})))


def _sample(s: Setting, kind: str, wish: BenchmarkOptions) -> Found:
    run = works.sampling(wish, str(s.device), kind)
    done: dict[str, float] = {}
    first = timed(lambda: done.update(run() or {}), s.device)
    graphs = _graphs()
    taken = s.seconds(run, 1 if s.smoke else 3)
    speed = done["tokens"] / median(taken)
    text = f"{speed:,.0f} tokens/s, {1e3 * median(taken) / done['nfe']:.2f} ms an evaluation"
    text += f", {spread(taken)}, first {first:.1f} s"
    return Found(text, None, {
        "tokens_per_second": speed, "seconds": taken, "nfe": done["nfe"],
        "graphs_later": _graphs() - graphs,
    })  # fmt: skip


def base_model(s: Setting) -> Any:
    """Of the shapes of SmolLM2-135M, with random weights in bf16."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not s.smoke:
        sizes = {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
            "intermediate_size": 1536, "vocab_size": 49152,
        }  # fmt: skip
    config = transformers.LlamaConfig(
        **sizes, num_key_value_heads=sizes["num_attention_heads"] // 3 or 1,
        max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(s.device, torch.bfloat16).eval()


def sample_adapted(s: Setting, count: int, graphs: bool = True) -> Found:
    """An adapted Llama in blocks of 4, one token an evaluation, as `sample`."""
    lm = base_model(s)
    model = adapt(lm, mask_token_id=1, block_size=4, clean="causal", prediction="shift")
    wish = SamplingOptions(max_new_tokens=s.sample.tokens, stop="none")

    def run() -> int:
        done = generate_tokens(model, [[0]] * count, wish)
        return sum(map(len, done.tokens))

    with evaluations(graphs):
        return _speed(s, run)


def sample_base(s: Setting, count: int) -> Found:
    """The same network as it is, by transformers' own `generate`."""
    lm, x = base_model(s), torch.zeros(count, 1, dtype=torch.int64, device=s.device)
    new = s.sample.tokens

    def run() -> int:
        mask = torch.ones_like(x)
        return int(lm.generate(x, attention_mask=mask, max_new_tokens=new, do_sample=True)
                   [:, 1:].numel())  # fmt: skip

    return _speed(s, run)


def _speed(s: Setting, run: Callable[[], int]) -> Found:
    done: list[int] = []
    first = timed(lambda: done.append(run()), s.device)
    taken = s.seconds(run, 1 if s.smoke else 3)
    speed = done[0] / median(taken)
    text = f"{speed:,.0f} tokens/s, {spread(taken)}, first {first:.1f} s"
    return Found(text, None, {"tokens_per_second": speed, "seconds": taken})


def attention(s: Setting) -> Found:
    """One layer's attention over both streams, forward and backward, in turn."""
    backends = ("dense", "blockwise", *(("flex",) if s.cuda else ()))
    runs = {b: works.attention(s.train, str(s.device), b) for b in backends}
    taken = {b: s.seconds(run) for b, run in runs.items()}
    figures: dict[str, Any] = {"seconds": taken}
    for name in backends[1:]:
        figures[f"{name}_over_dense"] = median(taken["dense"]) / median(taken[name])
    text = ", ".join(f"{name} {spread(seconds)}" for name, seconds in taken.items())
    return Found(text, None, figures)


def attention_of_ar(s: Setting) -> Found:
    """Causal attention: SDPA's own kernel, which "auto" takes, against flex (blockwise)."""
    layout, other = BlockLayout(s.train.length, 1), "flex" if s.cuda else "blockwise"
    shape = (s.train.batch_size, 12, s.train.length, 64)
    leaves = [
        torch.randn(shape, device=s.device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    ]
    outer = torch.randn_like(leaves[0])

    def step(mask: Any) -> None:
        torch.autograd.grad(attend(*leaves, mask), leaves, outer)

    taken = {
        name: s.seconds(partial(step, make_mask(layout, "clean", name, s.device)))
        for name in ("sdpa", other)
    }
    text = ", ".join(f"{name} {spread(seconds)}" for name, seconds in taken.items())
    faster = median(taken[other]) / median(taken["sdpa"])
    return Found(f"{text}: {faster:.2f} times", None, {"seconds": taken, "faster": faster})


def loss_alone(s: Setting) -> Found:
    """−log p of a step's masked tokens by slices, forward and backward."""
    width, words = 128 if s.smoke else 768, s.train.vocab_size
    count = s.train.batch_size * s.train.length * 17 // 32
    h = torch.randn(count, width, device=s.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, width, device=s.device, requires_grad=True)
    bias = torch.zeros(words, device=s.device, requires_grad=True)
    targets = torch.randint(words - 1, (count,), device=s.device)

    def step() -> None:
        with torch.autocast(s.device.type, torch.bfloat16):
            nll = subs_nll(h, weight, bias, targets, words - 1)
        torch.autograd.grad(nll.sum(), [h, weight, bias])

    taken = s.seconds(step)
    parts = len((loss_by_position if s.cuda else loss).slices(count, words))
    return Found(f"{spread(taken)}, {count} tokens in {parts} slices", None, {"seconds": taken})


def masks_of_documents(s: Setting) -> Found:
    """What documents cost a pass: the mask of both streams, made once for all layers."""
    length, rows = s.train.length, s.train.batch_size
    owner = torch.arange(length, device=s.device).expand(rows, -1) // 37
    layout = BlockLayout(length, s.train.block_size, documents=owner)
    taken = s.seconds(lambda: make_mask(layout, "two_stream", "auto", s.device, rows=rows))
    return Found(f"{spread(taken)} a pass", None, {"seconds": taken})


def update_of_average(s: Setting) -> Found:
    model = works.build_model(s.train, str(s.device))
    average = Average(model, 0.999)
    taken = s.seconds(lambda: average.update_parameters(model))
    with waiting(s) as count:
        average.update_parameters(model)
    right = count() == 0 if s.cuda else None  # a CPU's count has a number that is on the host
    return Found(f"{spread(taken)}, {count()} host waits", right, {"seconds": taken})


def validation(s: Setting) -> Found:
    """What evaluating costs in a run's own precision, and in float32."""
    model, x_0 = (
        works.build_model(s.train, str(s.device)),
        works.random_text(s.train, str(s.device)),
    )
    speeds = {}
    for name, bf16 in (("bf16", True), ("float32", False)):
        with torch.autocast(s.device.type, torch.bfloat16, enabled=bf16):
            taken = s.seconds(partial(likelihood, model, x_0, "exact_k", 2), 1 if s.smoke else 3)
        speeds[name] = x_0.numel() / median(taken)
    text = ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items())
    return Found(text, None, {"tokens_per_second": speeds})


def operators_of_a_step(s: Setting, graphs: bool) -> Found:
    """Operators, launches and copies of one evaluation of eight rows of the paper's network."""
    model = works.build_model(s.sample, str(s.device)).eval()
    convert(model, "bf16", s.device)
    model.graphs = graphs
    engine = Engine(model)
    for _ in range(8):
        engine.admit([1], SamplingOptions(max_new_tokens=19, stop="none"))
    for _ in range(8):  # two blocks, so that every shape was met
        engine.step()
    steps = 4
    if not s.cuda:
        with Operators() as noted:
            engine.step()
        return Found(f"{len(noted.names)} operators a step")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            engine.step()
    counts = {event.key: event.count / steps for event in seen.key_averages()}
    copies = [event for event in seen.key_averages() if "foreach_copy" in event.key]
    figures = {
        "operators": sum(n for name, n in counts.items() if name.startswith("aten::")),
        "launches": sum(n for name, n in counts.items() if "LaunchKernel" in name),
        "graph_launches": sum(n for name, n in counts.items() if "GraphLaunch" in name),
        "copied_ms": sum(getattr(event, "device_time_total", 0) for event in copies) / steps / 1e3,
    }
    text = ", ".join(f"{name} {figure:,.2f}" for name, figure in figures.items())
    return Found(f"{text}, each a step", None, figures)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
