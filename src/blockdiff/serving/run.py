"""`blockdiff serve`: a port, the models behind it, and an end that loses no text.

The port is taken before anything is loaded; the server answers while models are loaded (`/ready`
says 503). SIGTERM and Ctrl-C: no new rows, those running finish within the limit, then exit 0.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from blockdiff.data.chat_templates import read_template
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.models.loading import load_in
from blockdiff.models.tensors import free_memory
from blockdiff.printing import plain_console, printable
from blockdiff.serving.app import make_app
from blockdiff.serving.limits import Limits
from blockdiff.serving.room import SHARE
from blockdiff.serving.served import NO_PROMISE, Served
from blockdiff.serving.wire import Wire
from blockdiff.serving.worker import Worker

_LOG = logging.getLogger("blockdiff.serving")


def serve(wish: Any, taken: socket.socket, api_key: str | None = None) -> None:
    """Serves until a signal comes; `wish` is the command line's `ServeOptions`.

    `taken`: a socket that listens (`port.listen`). Raises `InputError` for models that cannot be
    opened.
    """
    sources = names_of(wish.models)
    template = None if wish.chat_template is None else read_template(wish.chat_template)
    device = choose_device(wish.device)
    limits = Limits(
        prompt_tokens=wish.max_prompt_tokens, new_tokens=wish.max_new_tokens,
        body_bytes=wish.max_body, seconds=wish.timeout, drain_seconds=wish.drain,
        api_key=api_key, origins=tuple(filter(None, (wish.cors or "").split(","))),
    )  # fmt: skip
    models: dict[str, Served] = {}

    def opened() -> dict[str, Served]:
        # Rows share what memory all of the models leave.
        loaded = {
            name: load_in(source, wish.precision, device, tokenizer=wish.tokenizer)
            for name, source in sources.items()
        }
        return {name: made(name, *parts) for name, parts in loaded.items()}

    def made(name: str, model: Any, tokenizer: Any, precision: str) -> Served:
        memory = int(SHARE * free_memory([device]) / len(sources))
        worker = Worker(model, rows=wish.rows, queue=wish.queue, memory=memory)
        served = Served(name, model, tokenizer, worker, precision, template)
        say(f"{name}: {precision}, context of {served.context} tokens, {worker.room}")
        if precision != "float32":
            say(f"{name}: in {precision} {NO_PROMISE}")
        if served.plain:
            say(f"{name} has no chat template: messages are written as “User: … Assistant: …”")
        worker.start()
        return served

    with taken:
        host, port = taken.getsockname()[:2]
        say(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        run(models, limits, [taken], opened)


def run(models: dict[str, Served], limits: Limits, sockets: Any, opening: Any) -> None:
    """Runs the server until a signal comes; `opening` gives the models, in a thread of its own."""
    app = make_app(models, limits)
    failures: list[BaseException] = []

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        def opened() -> None:
            try:
                models.update(opening())
                # The collector would look through all that is loaded again and again.
                gc.collect()
                gc.freeze()
                if models:
                    say("ready")
            except BaseException as error:
                failures.append(error)
                server.should_exit = True

        threading.Thread(target=opened, daemon=True).start()
        yield
        await asyncio.to_thread(drain, models, 0.0)

    app.router.lifespan_context = life
    server = Drained(models, limits, uvicorn.Config(
        app, http=Wire, log_level="warning", access_log=False, server_header=False,
        date_header=False,
    ))  # fmt: skip
    # The thread that computes waits so long at most for one that writes answers.
    sys.setswitchinterval(0.0005)
    server.run(sockets=sockets)
    if failures:
        raise failures[0]


class Drained(uvicorn.Server):
    """A server that ends as if nothing had happened: uvicorn's own raises the signal again.

    While running texts finish it still listens: `/ready` and new requests are answered 503.
    """

    def __init__(
        self, models: Mapping[str, Served], limits: Limits, config: uvicorn.Config
    ) -> None:
        super().__init__(config)
        self.models, self.limits = models, limits
        self.draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.draining:
            self.should_exit = self.force_exit = True
            return
        self.draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        begin = time.monotonic()
        drain(self.models, self.limits.drain_seconds)
        # What was written is read within the same time, and a second more.
        left = self.limits.drain_seconds - (time.monotonic() - begin)
        self.config.timeout_graceful_shutdown = int(max(left, 0)) + 1
        self.should_exit = True


def drain(models: Mapping[str, Served], seconds: float) -> None:
    """All workers at the same time."""
    threads = [
        threading.Thread(target=one.worker.drain, args=(seconds,)) for one in models.values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def names_of(sources: str | list[str]) -> dict[str, str]:
    """name → folder or hub id; raises `InputError` for two of one name."""
    found: dict[str, str] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        name = Path(source).resolve().name if Path(source).is_dir() else source
        if name in found:
            raise InputError(f"`models`: two are called {name}; name one folder otherwise")
        found[name] = source
    return found


def say(text: str) -> None:
    """A line on standard error."""
    plain_console(stderr=True, soft_wrap=True).print(printable(text), highlight=False)
