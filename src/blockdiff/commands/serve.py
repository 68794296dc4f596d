"""`blockdiff serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockdiff import checks
from blockdiff.commands.options import Command, Given
from blockdiff.errors import InputError, need
from blockdiff.evaluation.options import Precision


@dataclass(frozen=True)
class ServeOptions:
    """Serve models behind OpenAI's API.

    Attributes:
        models: Model folders or hub ids, by their last name in requests; starter is the one that
            comes with the package.
        host: Address to listen at; 0.0.0.0 is every one of the machine.
        port: Port to listen at; 0 for a free one.
        api_key: What clients have to send as their key; also BLOCKDIFF_API_KEY of the environment,
            which other users of the machine cannot see.
        cors: Origin whose pages may call the server from a browser, or several with commas; * for
            all.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
        precision: Weights. float32 gives the same text for the same seed whatever else runs; bf16,
            int8 and auto (bf16 where the processor is made for it) do not promise it.
        tokenizer: Folder or hub id of the tokenizer, where the models have none.
        chat_template: File with the chat template (Jinja) in place of the tokenizers' own.
        rows: Texts written at once, for each model; by default what two fifths of the free memory
            have room for, at most 128.
        queue: Texts that may wait for a row; further ones are answered 429.
        max_prompt_tokens: Longest prompt; the model's context when left out.
        max_new_tokens: Longest text that a request may ask for.
        max_body: Bytes of the largest request.
        timeout: Seconds that a request may take.
        drain: Seconds that running texts have to finish after SIGTERM.
    """

    models: str | list[str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors: str | None = None
    device: str = "auto"
    precision: Precision = "float32"
    tokenizer: str | None = None
    chat_template: str | None = None
    rows: int | None = None
    queue: int = 256
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    max_body: int = 1048576
    timeout: float = 300.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers that cannot be meant."""
        whole = {
            "port": (0, 65535), "rows": (1, 4096), "queue": (0, 1_000_000),
            "max_prompt_tokens": (1, checks.LARGEST_TEXT),
            "max_new_tokens": (1, checks.LARGEST_TEXT), "max_body": (1, 2**31),
        }  # fmt: skip
        times = {"timeout": (0, 1e6, False, True), "drain": (0, 1e6, True, True)}
        checks.options(self, whole, times, own=["models"])
        if self.api_key is not None and not self.api_key.isascii():
            raise InputError("`api_key` has letters that no header can hold; use ASCII")


def _run(given: Given) -> None:
    wish = given.make(ServeOptions)
    # Threads that compute share the cores with the one that answers: they soon wait asleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    from blockdiff.serving.port import listen

    taken = listen(wish.host, wish.port)
    need("fastapi", "uvicorn", "httptools", "prometheus_client", extra="serve", what="the server")
    from blockdiff.serving.run import serve

    serve(wish, taken, wish.api_key or os.environ.get("BLOCKDIFF_API_KEY") or None)


COMMAND = Command(
    summary="Serve models behind OpenAI's API.",
    kinds=(ServeOptions,),
    run=_run,
    places=("models",),
    sections={"models": "Models and address", "rows": "Limits"},
    examples=(
        "blockdiff serve starter",
        "blockdiff serve runs/bd3lm runs/smol --port 8080 --rows 16",
        "blockdiff serve starter --host 0.0.0.0 --api-key secret --precision bf16",
    ),
)
