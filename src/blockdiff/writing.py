"""What `blockdiff generate` shows: text, a live view, a page, or JSON."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from blockdiff.api import encode_prompts, to_text
from blockdiff.data.loading import load
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.models.precision import convert, resolve_precision
from blockdiff.outputs import new_file, to_json
from blockdiff.printing import printable
from blockdiff.replay import Recorder, write_page
from blockdiff.sampling.generate import collect, stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.watch import watch


def write_texts(source: str, wish: Any, options: SamplingOptions) -> None:
    """Generates as asked and prints; `wish` is the command line's `GenerateOptions`."""
    prompts = _prompts(wish.prompt, wish.prompt_file)
    if wish.page is not None:
        new_file("page", wish.page)
    model, tokenizer = load(source, tokenizer=wish.tokenizer, device=choose_device())
    # The compiler brings weights into order itself.
    precision = resolve_precision(wish.precision, model.device)
    convert(model, precision, model.device, few_tokens=not wish.compile)
    if wish.compile:
        model.compile_layers()
    ids = encode_prompts(model, prompts, tokenizer, wish.samples)
    block_size = model.config.choose_block_size(options.block_size)
    recorder = Recorder(tokenizer, len(ids[0]), block_size)
    begin = time.perf_counter()

    steps = stream_tokens(model, ids, options)
    if wish.page:
        steps = recorder.follow(steps)
    if wish.watch and not wish.json:
        last = watch(
            steps,
            tokenizer,
            [len(row) for row in ids],
            model.config.mask_token_id,
            block_size,
            delay=wish.delay,
        )
    else:
        for last in steps:  # noqa: B007 - the last step holds the result
            pass
    done = to_text(
        collect(last, ids, model.config.eos_token_id, time.perf_counter() - begin), ids, tokenizer
    )
    if wish.page:
        write_page(recorder.recording(), Path(wish.page), title=f"{source} writes")
    if wish.json:
        record = {
            "model": source,
            "options": asdict(options),
            "precision": precision,
            "device": str(model.device),
            "prompts": [prompt for prompt in prompts for _ in range(wish.samples)],
            "texts": done.texts,
            "tokens": [len(row) for row in done.tokens],
            "finish": done.finish,
            "rejection_rate": done.rejection_rate,
            "nfe": done.nfe,
            "seconds": done.seconds,
            "tokens_per_second": done.tokens_per_second,
            "tokens_per_nfe": done.tokens_per_nfe,
        }
        print(to_json(record, indent=2))
        return
    if not wish.watch:
        _print_texts(prompts, wish.samples, done.texts)
    Console(stderr=True, highlight=False).print(
        f"{sum(map(len, done.tokens))} tokens, {sum(done.nfe)} network evaluations, "
        f"{done.tokens_per_second:.1f} tokens/s, {done.rejection_rate:.0%} rejected",
        style="dim",
    )


def _prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt-file exclude each other; give one")
    if prompt_file is None:
        return [prompt or ""]
    try:
        lines = Path(prompt_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts in {prompt_file}: {error}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{prompt_file} holds no prompt")
    return prompts


def _print_texts(prompts: list[str], samples: int, texts: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for index, text in enumerate(texts):
        if len(texts) > 1:
            console.rule(f"text {index + 1}", style="dim")
        console.print(prompts[index // samples], style="bold", end="", markup=False)
        console.print(printable(text), markup=False)
