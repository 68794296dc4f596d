"""The server's routes: OpenAI's, and those that tell of the denoising.

    app = make_app({"starter": served}, Limits())

`models` may be filled after the app has begun to listen; `/ready` tells.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import check_estimator
from blockdiff.evaluation.score import score_tokens
from blockdiff.serving import answers, errors, replies, schemas
from blockdiff.serving.denoise import Denoise
from blockdiff.serving.errors import Refused, refusal
from blockdiff.serving.gate import Gate
from blockdiff.serving.limits import Limits
from blockdiff.serving.metrics import Metrics
from blockdiff.serving.page import page_response
from blockdiff.serving.served import Served
from blockdiff.version import VERSION

T = TypeVar("T")
_SAID: dict[int | str, dict[str, Any]] = {
    status: {"model": replies.ErrorAnswer, "description": text}
    for status, text in {
        400: "The request cannot be meant", 401: "Wrong or no API key", 404: "No such model",
        408: "The body took too long", 413: "The body is too large",
        429: "The queue is full; Retry-After says when to come again",
        500: "The server failed", 503: "Loading or stopping", 504: "It took too long",
    }.items()
}  # fmt: skip


class Server:
    """What the routes share."""

    def __init__(self, models: Mapping[str, Served], limits: Limits) -> None:
        self.models, self.limits, self.metrics = models, limits, Metrics(models)
        self.created = int(time.time())

    def find(self, name: str | None) -> Served:
        if not self.models:
            raise Refused(503, "the model is being loaded", code="loading", retry=2)
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"there is no `model` of that name; there is {known}", "model",
                          "model_not_found")  # fmt: skip
        return self.models[name]

    async def apart(self, served: Served, work: Callable[..., T], *given: Any) -> T:
        """Runs what takes long outside the event loop; its errors as they are answered."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(served.thread, functools.partial(work, *given))
        except InputError as error:
            raise refusal(error, str(getattr(served.model, "name_or_path", ""))) from None


def make_app(models: Mapping[str, Served], limits: Limits | None = None) -> FastAPI:
    """The application; `models` by name, the first is meant where a request names none."""
    server = Server(models, Limits() if limits is None else limits)
    app = FastAPI(
        title="blockdiff", version=VERSION, docs_url=None, redoc_url=None,
        summary="Block diffusion language models behind OpenAI's API.",
    )  # fmt: skip
    app.state.server = server
    errors.install(app)
    routes = APIRouter(responses=_SAID)
    _texts(routes, server)
    _facts(app, routes, server)
    app.include_router(routes)
    if server.limits.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(server.limits.origins), allow_methods=["*"],
            allow_headers=["*"],
        )  # fmt: skip
    app.add_middleware(Gate, limits=server.limits, metrics=server.metrics)
    described = app.openapi

    def openapi() -> dict[str, Any]:
        """With what streams hold, and without the 422 that is never answered."""
        found = described()
        found["components"]["schemas"] |= replies.described()
        for path in found["paths"].values():
            for method in path.values():
                method["responses"].pop("422", None)
        return found

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _texts(routes: APIRouter, server: Server) -> None:
    def described(whole: type[replies.Reply], chunk: type[replies.Reply]) -> dict[int | str, Any]:
        return {200: {"model": whole, "content": replies.chunks(chunk)}}

    text = described(replies.CompletionAnswer, replies.CompletionChunk)
    message = described(replies.ChatAnswer, replies.ChatChunk)

    @routes.post("/v1/completions", responses=text)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Texts that go on from prompts."""
        return await answers.Completion(server, body, request).response()

    @routes.post("/v1/chat/completions", responses=message)
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        """The next message of a conversation."""
        return await answers.Chat(server, body, request).response()

    @routes.post(
        "/v1/denoise", responses={200: {"content": replies.denoising()}},
        response_class=StreamingResponse,
    )  # fmt: skip
    async def denoise(body: schemas.DenoiseRequest, request: Request) -> Response:
        """A text while it is denoised, as server-sent events."""
        return await Denoise(server, body, request).response()

    @routes.post("/v1/score")
    async def score(body: schemas.ScoreRequest) -> replies.ScoreAnswer:
        """How likely continuations are, given their beginning."""
        served = server.find(body.model)
        after = [body.continuation] if isinstance(body.continuation, str) else body.continuation

        def encoded() -> list[tuple[list[int], list[int]]]:
            check_estimator(body.estimator)
            pairs = [served.pair(body.context, one) for one in after]
            for before, behind in pairs:
                if len(before) + len(behind) > served.context:
                    raise InputError(
                        f"`context` and `continuation` come to {len(before) + len(behind)} tokens; "
                        f"the model's context is {served.context}"
                    )
                if not behind:
                    raise InputError("`continuation` is empty; give at least one token")
            return pairs

        found = []
        for before, behind in await server.apart(served, encoded):
            work = functools.partial(
                score_tokens, served.model, [before], [behind], estimator=body.estimator,
                draws=body.draws, seed=body.seed, greedy=body.greedy,
            )  # fmt: skip
            try:
                one = (await asyncio.wrap_future(served.worker.call(work)))[0]
            except Exception as error:
                raise refusal(error) from None
            found.append(replies.Scored(**vars(one)))
        return replies.ScoreAnswer(model=served.name, data=found)


def _facts(app: FastAPI, routes: APIRouter, server: Server) -> None:
    @routes.get("/v1/models", response_model=replies.Models)
    async def models() -> dict[str, Any]:
        """The models there are."""
        server.find(None)
        data = [one.entry(server.created) for one in server.models.values()]
        return {"object": "list", "data": data}

    @routes.get("/v1/models/{name:path}", response_model=replies.Model)
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        return server.find(name).entry(server.created)

    @app.get("/health", response_model=replies.State)
    async def health() -> dict[str, str]:
        """Whether the server listens."""
        return {"status": "ok"}

    @app.get("/ready", responses={200: {"model": replies.State}, 503: _SAID[503]})
    async def ready() -> Response:
        """Whether the models answer."""
        stopping = any(one.worker.draining for one in server.models.values())
        if not server.models or stopping:
            raise Refused(503, "stopping" if stopping else "the model is being loaded", retry=2,
                          code="stopping" if stopping else "loading")  # fmt: skip
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", responses={401: _SAID[401]}, response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text."""
        return Response(server.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def front() -> Response:
        return page_response()
