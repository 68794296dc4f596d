"""A text while it is denoised, as events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from blockdiff.outputs import to_json
from blockdiff.replay import text_pieces
from blockdiff.serving import schemas
from blockdiff.serving.answers import Answer
from blockdiff.serving.errors import Refused
from blockdiff.serving.jobs import Finished, Job, Progress


class Denoise(Answer):
    """Each evaluation of one row: what it fixed, and what it wrote over."""

    kind, apart, streams = "denoise", 256, True
    body: schemas.DenoiseRequest

    def prompts(self) -> list[list[int]]:
        if (self.body.messages is None) == (self.body.prompt is None):
            raise Refused(400, "give `prompt` or `messages`, and not both", "prompt",
                          "invalid_value")  # fmt: skip
        if (self.body.n or 1) != 1:
            raise Refused(400, "`n` is 1 here; leave it out", "n", "unsupported")
        if self.body.messages is None:
            return [self.served.encode(self.body.prompt or "")]
        self.chat = True
        return [self.served.chat([one.message for one in self.body.messages])]

    def _jobs(self) -> list[Job]:
        self.chat = self.body.messages is not None
        self.shown: dict[int, int] = {}  # the token at each position
        return super()._jobs()

    def failure(self, error: Refused) -> str:
        return _event("error", error.body)

    def end(self) -> list[str]:
        return []

    async def _stream(self) -> AsyncIterator[str]:
        config, options = self.served.model.config, self.options
        size, before = config.sampling_blocks(options.block_size)[1], len(self.jobs[0].prompt)
        yield _event("start", {
            "id": self.id, "model": self.served.name, "prompt_tokens": before,
            "sampler": getattr(options.sampler, "name", options.sampler), "block_size": size,
            "offset": -before % size if config.prompt_grid == "prompt_end" else 0,
            "max_tokens": options.max_new_tokens, "seed": self.seed,
        })  # fmt: skip
        try:
            async for part in super()._stream():
                yield part
        except Refused as error:
            yield self.failure(error)

    def parts(self, number: int, event: Progress | Finished) -> list[str]:
        choice, pieces = self.choices[number], []
        if isinstance(event, Progress):
            self.shown |= dict(zip(event.at, event.tokens, strict=True))
            for at in event.at:
                before = self.shown.get(at - 1)
                ids = [one for one in (before, self.shown[at]) if one is not None]
                pieces.append(text_pieces(self.served.tokenizer, ids)[-1])
            choice.see(replace(event, logprobs=None))
            return [_event("step", {
                "nfe": event.nfe, "at": event.at, "tokens": event.tokens, "text": pieces,
                "edited": event.edited, "final": event.final, "seconds": event.seconds,
            })]  # fmt: skip
        choice.see(event)
        seconds = event.seconds
        return [_event("done", {
            "text": choice.writer.text, "pieces": text_pieces(self.served.tokenizer, event.tokens),
            "finish_reason": choice.reason, "usage": self.usage(),
            "seconds": seconds, "tokens_per_second": len(event.tokens) / max(seconds, 1e-9),
        })]  # fmt: skip


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {to_json(data)}\n\n"
