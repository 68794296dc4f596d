"""Replicas of the server by Ray Serve: processes on one machine or many, behind one address.

    from blockdiff.serving.replicas import serve_replicas

    serve_replicas("runs/bd3lm", replicas=2, port=8000)

Ray's proxy gives each request to one replica, starts a new one where one died, and gives nothing to
one that does not answer. What a dead replica held, its proxy sends to another (`Again`): a request
with a seed comes to the same text there. Where an answer has begun to stream it cannot be begun
anew, and ends with an error in its last event.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass, field
from typing import Any

from blockdiff import checks
from blockdiff.errors import need
from blockdiff.serving.errors import Refused
from blockdiff.serving.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Where Ray's proxies, processes of their own, find what lies before them.
VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
TRIES = 3


class Again:
    """Sends a request again whose replica died before it answered; ASGI.

    After `tries` it is answered with 503. A body over `body_bytes` is not kept and not sent again.
    """

    def __init__(self, app: Any, tries: int = TRIES, body_bytes: int = Limits.body_bytes) -> None:
        self.app, self.tries, self.body_bytes = app, tries, body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        kept: list[Message] = []
        more, size = True, 0
        while more and size <= self.body_bytes:
            kept.append(await receive())
            size += len(kept[-1].get("body", b""))
            more = bool(kept[-1].get("more_body"))
        start: Message | None = None
        whole = False

        async def told(message: Message) -> None:
            nonlocal start, whole
            if message["type"] == "http.response.start":
                start = message
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        for _ in range(1 if more else self.tries):
            await self.app(dict(scope), _replayed(kept, receive), told)
            if start is not None:
                break
        if whole:
            return
        failure = Refused(503, "the process that held the request ended; send it again",
                          code="replica_lost", retry=1)  # fmt: skip
        if start is None:
            answer = failure.response
            await answer(scope, receive, send)
        elif any(name.lower() == b"content-type" and b"event-stream" in value
                 for name, value in start.get("headers", ())):  # fmt: skip
            event = f"event: error\ndata: {json.dumps(failure.body)}\n\n"
            await send({"type": "http.response.body", "body": event.encode()})


def _replayed(kept: list[Message], receive: Receive) -> Receive:
    """What `receive` gave, and then what it gives."""
    left = iter(kept)

    async def receive_again() -> Message:
        for message in left:
            return message
        return await receive()

    return receive_again


def retrying() -> list[Any]:
    """What Ray's proxies are told to put before the replicas."""
    from starlette.middleware import Middleware

    return [Middleware(Again)]


@dataclass(frozen=True)
class Replicas:
    """What is served, and how often.

    Attributes:
        model: Model folder or hub id, at the same place on every machine.
        replicas: Processes, each with the model.
        precision: Weights; in float32 a text does not depend on the replica.
        device: cpu, cuda or auto; of a GPU each replica takes one.
        name: What requests call the model; its source when left out.
        limits: Of each replica.
    """

    model: str
    replicas: int = 2
    precision: str = "float32"
    device: str = "auto"
    name: str | None = None
    limits: Limits = field(default_factory=Limits)

    def app(self) -> Any:
        """Ray Serve's application, for `serve.run`; raises `InputError` where Ray is missing."""
        serve: Any = need("ray.serve", extra="ray", what="serving by replicas")
        need("fastapi", extra="serve", what="a server")
        import ray

        checks.whole_number("replicas", self.replicas, 1, 1024)
        there = ray.cluster_resources() if ray.is_initialized() else {}
        gpus = self.device.startswith("cuda") or (self.device == "auto" and there.get("GPU", 0))
        told = asdict(self) | {"limits": self.limits, "device": "cuda" if gpus else "cpu"}
        told.pop("replicas")

        def build() -> Any:
            return built(**told)

        deployment = serve.deployment(
            name="blockdiff", num_replicas=self.replicas,
            ray_actor_options={"num_gpus": 1} if gpus else {"num_cpus": 0},
            # Queues and refusals are the server's own.
            max_ongoing_requests=10_000,
            graceful_shutdown_timeout_s=self.limits.drain_seconds,
            health_check_period_s=2, health_check_timeout_s=30,
        )  # fmt: skip
        return deployment(serve.ingress(build)()).bind()


def built(model: str, precision: str, device: str, name: str | None, limits: Limits) -> Any:
    """A replica's app, its model opened and its worker at work."""
    from blockdiff.models.loading import load_in
    from blockdiff.serving.app import make_app
    from blockdiff.serving.served import Served
    from blockdiff.serving.worker import Worker

    network, tokenizer, precision = load_in(model, precision, device, few_tokens=True)
    worker = Worker(network)
    worker.start()
    known = name or model
    return make_app({known: Served(known, network, tokenizer, worker, precision)}, limits)


def serve_replicas(
    model: str, *, host: str = "127.0.0.1", port: int = 8000, address: str | None = None,
    **told: Any,
) -> None:  # fmt: skip
    """Serves `Replicas(model, …)` until `ray.serve.shutdown()`; returns when they answer.

    `address`: of a Ray cluster; this machine when left out. On a cluster that runs already, its
    machines must have been started with the variable `VARIABLE` set, or what a dead replica held
    is answered with 500 and not sent again.
    """
    os.environ.setdefault(VARIABLE, "blockdiff.serving.replicas:retrying")
    from blockdiff.serving.batch import join

    join(address)
    serve: Any = need("ray.serve", extra="ray", what="serving by replicas")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": host, "port": port})
    serve.run(Replicas(model, **told).app(), name="blockdiff", route_prefix="/")
