"""Requests that write text, from the body to the last byte of the answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from blockdiff.outputs import to_json
from blockdiff.serving import schemas
from blockdiff.serving.errors import Refused, refusal
from blockdiff.serving.inbox import Inbox
from blockdiff.serving.jobs import Failed, Finished, Job, Progress
from blockdiff.serving.text import Token, Writer

if TYPE_CHECKING:
    from blockdiff.serving.app import Server


class Choice:
    """One row on its way to its text."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.tokens: dict[int, tuple[int, float | None]] = {}  # fixed and not final yet
        self.given: list[Token] = []  # whose text was given out
        self.done: Finished | None = None
        self.reason: str | None = None

    def see(self, event: Progress | Finished) -> tuple[str, list[Token]]:
        """What more of the text an event tells, with its tokens."""
        if isinstance(event, Progress):
            known: list[Any] = event.logprobs or [None] * len(event.at)
            self.tokens |= dict(zip(event.at, zip(event.tokens, known, strict=True), strict=True))
            new = [self.tokens.pop(at) for at in range(len(self.writer.ids), event.final)]
            if not new:
                return "", []
        else:
            said = len(self.writer.ids)
            if event.tokens[:said] != self.writer.ids:  # run again below float32
                raise Refused(500, "the text was interrupted; ask again", code="interrupted")
            known = event.logprobs or [None] * len(event.tokens)
            new = list(zip(event.tokens, known, strict=True))[said:]
            self.done = event
        ids, logprobs = [one[0] for one in new], [one[1] for one in new]
        text, tokens = self.writer.write(ids, logprobs, last=self.done is not None)
        self.given += tokens
        if self.done is not None:
            self.reason = "stop" if self.done.stopped or self.writer.ended else "length"
        return text, tokens


class Answer:
    """What the routes have in common; each says how its answer is written."""

    kind = object_name = ""
    chat = False
    apart = 1

    def __init__(self, server: Server, body: schemas.Sampling, request: Request) -> None:
        self.server, self.body, self.request = server, body, request
        self.served = server.find(body.model)
        self.id = f"{self.kind}-{secrets.token_hex(12)}"
        self.created, self.seed = int(time.time()), body.seed
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        self.begin = request.scope.get("blockdiff.begin", time.monotonic())
        self.first = False  # whether the first tokens were there

    def prompts(self) -> list[list[int]]:
        """The ids of each prompt."""
        raise NotImplementedError

    def wanted(self) -> int | None:
        return self.body.max_tokens

    @property
    def logprobs(self) -> bool:
        return False

    def _jobs(self) -> list[Job]:
        served, limits = self.served, self.server.limits
        count = self.body.n or 1
        prompts = self.prompts()
        # More than there are rows and places in the queue would wait for ever.
        most = min(limits.choices, served.worker.rows + served.worker.queue)
        if len(prompts) * count > most:
            raise Refused(400, f"`n` asks for {len(prompts) * count} texts; the server writes "
                          f"{most} a request at most", "n", "too_many")  # fmt: skip
        longest, field = max(map(len, prompts), default=0), "messages" if self.chat else "prompt"
        most = served.context - 1
        if limits.prompt_tokens is not None:
            most = min(most, limits.prompt_tokens)
        if longest > most:
            raise Refused(400, f"`{field}` has {longest} tokens; there is room for {most}, in a "
                          f"context of {served.context}", field,
                          "context_length_exceeded")  # fmt: skip
        wanted = self.wanted()
        if wanted is None:
            wanted = min(served.context - longest, limits.new_tokens, 512 if self.chat else 128)
        if wanted > limits.new_tokens:
            raise Refused(400, f"`max_tokens` is {wanted}; the server writes {limits.new_tokens} "
                          "at most", "max_tokens", "too_many")  # fmt: skip
        told = self.body.told() | {"max_new_tokens": wanted, "seed": self.seed}
        if self.logprobs:
            told["logprobs"] = True
        options = served.options(told, self.chat)
        jobs = [
            Job(prompt, options, number, progress=self.streams)
            for number, prompt in enumerate(p for p in prompts for _ in range(count))
        ]
        self.options = options
        return jobs

    async def response(self) -> Response:
        self.jobs = jobs = await self.server.apart(self.served, self._jobs)
        stops = list(self.body.stops)
        if self.chat and self.served.turn_end.text:
            stops.append(self.served.turn_end.text)
        self.choices = [
            Choice(Writer(self.served.tokenizer, job.prompt, stops, self.chat)) for job in jobs
        ]
        if not jobs:
            raise Refused(400, "`prompt` is empty; give at least one", "prompt", "invalid_value")
        self.inbox = Inbox(self.apart)
        try:
            self.inbox.submit(self.served.worker, jobs, self.request)
        except Exception as error:
            raise refusal(error) from None
        if self.streams:
            # The first event tells whether there will be a text at all.
            parts = self._stream()
            try:
                first = await anext(parts)
            except BaseException:
                self.inbox.close()
                raise
            return StreamingResponse(
                _with(first, parts), media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )  # fmt: skip
        try:
            async for number, event in self._events():
                self.choices[number].see(event)
        finally:
            self.inbox.close()
        if self.inbox.gone:
            return Response(status_code=499)
        return JSONResponse(self.whole())

    @property
    def streams(self) -> bool:
        return bool(self.body.stream)

    async def _events(self) -> AsyncIterator[tuple[int, Progress | Finished]]:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.server.limits.seconds - (time.monotonic() - self.begin)
        async for number, event in self.inbox.events(until):
            if isinstance(event, Failed):
                raise refusal(event.error)
            if not self.first and (isinstance(event, Finished) or event.final):
                self.first = True
                ago = event.seconds - event.first_seconds if isinstance(event, Finished) else 0.0
                self.server.metrics.first.labels(self.served.name).observe(
                    time.monotonic() - self.begin - ago
                )
            yield number, event

    async def _stream(self) -> AsyncIterator[str]:
        begun = False
        try:
            async for number, event in self._events():
                for part in self.parts(number, event):
                    begun = True
                    yield part
                await asyncio.sleep(0)
            for part in self.end():
                yield part
        except Refused as error:
            if not begun:
                raise
            yield self.failure(error)
        finally:
            self.inbox.close()

    def failure(self, error: Refused) -> str:
        return f"data: {to_json(error.body)}\n\n"

    def end(self) -> list[str]:
        wish, found = self.body.stream_options, []
        if wish is not None and wish.include_usage:
            found.append(self.chunk([], usage=self.usage()))
        return [*found, "data: [DONE]\n\n"]

    def usage(self) -> dict[str, Any]:
        """Tokens and evaluations of all choices; a prompt counts once."""
        prompts = self.jobs[:: self.body.n or 1]
        before = sum(len(job.prompt) for job in prompts)
        done = [choice.done for choice in self.choices if choice.done is not None]
        new, nfe = sum(len(one.tokens) for one in done), sum(one.nfe for one in done)
        # As often as the prompts count.
        first = [choice.done for choice in self.choices[:: self.body.n or 1]]
        known = sum(one.cached_tokens for one in first if one is not None)
        return {
            "prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new,
            "evaluations": nfe, "tokens_per_evaluation": round(new / max(nfe, 1), 4),
            "prompt_tokens_details": {"cached_tokens": known},
        }  # fmt: skip

    def frame(self, choices: list[dict[str, Any]], name: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": name, "created": self.created, "model": self.served.name,
            "system_fingerprint": f"blockdiff-{self.served.precision}", "seed": self.seed,
            "choices": choices,
        }  # fmt: skip

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {to_json(self.frame(choices, self.object_name) | more)}\n\n"

    def piece(self, text: str, tokens: list[Token], choice: Choice) -> dict[str, Any]:
        """What a chunk says of a choice."""
        raise NotImplementedError

    def parts(self, number: int, event: Progress | Finished) -> list[str]:
        choice = self.choices[number]
        text, tokens = choice.see(event)
        if not (text or choice.reason or (tokens and self.logprobs)):
            return []
        return [self.chunk([{"index": number, **self.piece(text, tokens, choice)}])]

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError


async def _with(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    yield first
    async for part in rest:
        yield part


class Completion(Answer):
    kind, object_name = "cmpl", "text_completion"
    body: schemas.CompletionRequest

    @property
    def logprobs(self) -> bool:
        return self.body.logprobs is not None

    def prompts(self) -> list[list[int]]:
        given: Any = self.body.prompt
        if self.body.best_of not in (None, self.body.n or 1):
            raise Refused(400, "`best_of` is not supported; leave it out", "best_of", "unsupported")
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        return [self.served.encode(one) if isinstance(one, str) else list(one) for one in given]

    def piece(self, text: str, tokens: list[Token], choice: Choice) -> dict[str, Any]:
        found = None
        if self.logprobs:
            # A token is given out with its last character: its first may have come sooner.
            ends, end = [], choice.writer.made - sum(len(token.text) for token in tokens)
            for token in tokens:
                ends.append(end)
                end += len(token.text)
            found = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{token.text: token.logprob} for token in tokens],
                "text_offset": ends,
            }
        return {"text": text, "logprobs": found, "finish_reason": choice.reason}

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": number, **self.piece(choice.writer.text, choice.given, choice)}
            for number, choice in enumerate(self.choices)
        ]
        return self.frame(choices, self.object_name) | {"usage": self.usage()}


class Chat(Answer):
    kind, object_name, chat = "chatcmpl", "chat.completion.chunk", True
    body: schemas.ChatRequest

    @property
    def logprobs(self) -> bool:
        return bool(self.body.logprobs)

    def wanted(self) -> int | None:
        return self.body.max_completion_tokens or self.body.max_tokens

    def prompts(self) -> list[list[int]]:
        return [self.served.chat([one.message for one in self.body.messages])]

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                {"token": t.text, "logprob": t.logprob, "bytes": list(t.text.encode()),
                 "top_logprobs": []}
                for t in tokens
            ],
            "refusal": None,
        }  # fmt: skip

    def piece(self, text: str, tokens: list[Token], choice: Choice) -> dict[str, Any]:
        first = len(choice.writer.text) == len(text)
        delta = {"role": "assistant"} if first else {}
        return {
            "delta": delta | {"content": text},
            "logprobs": self._logprobs(tokens),
            "finish_reason": choice.reason,
        }

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": choice.writer.text, "refusal": None},
                "logprobs": self._logprobs(choice.given),
                "finish_reason": choice.reason,
            }
            for number, choice in enumerate(self.choices)
        ]
        return self.frame(choices, "chat.completion") | {"usage": self.usage()}
