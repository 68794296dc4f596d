"""What answers hold, as the OpenAPI schema describes them; the tests hold answers to it."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

_REFS = "#/components/schemas/{model}"
Reason: TypeAlias = Literal["stop", "length"]


class Reply(BaseModel):
    """No field but those that are named."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Reply):
    error: ErrorBody


class Known(Reply):
    cached_tokens: int


class Usage(Reply):
    """Of all choices; a prompt counts once. `cached_tokens` of it were known: nothing computed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    evaluations: int
    tokens_per_evaluation: float
    prompt_tokens_details: Known


class Frame(Reply):
    """`seed`: the request's, else the one it got; with it the text can be had again."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int


class TextLogprobs(Reply):
    """Of each token in the evaluation that fixed it; offsets count characters of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Reason


class TextPiece(TextChoice):
    finish_reason: Reason | None  # type: ignore[assignment]


class CompletionAnswer(Frame):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class CompletionChunk(Frame):
    """A piece of the texts; `usage` in one without choices, the last, where it is asked for."""

    object: Literal["text_completion"]
    choices: list[TextPiece]
    usage: Usage | None = None


class TokenLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class Message(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str


class ChatChoice(Reply):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatPiece(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatAnswer(Frame):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Frame):
    """A piece of the messages; `usage` in one without choices, the last, where it is asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None


class Start(Reply):
    """What is about to be written; `offset`: of the first block's begin, before the new tokens."""

    id: str
    model: str
    prompt_tokens: int
    sampler: str
    block_size: int
    offset: int
    max_tokens: int
    seed: int


class Step(Reply):
    """An evaluation that wrote something.

    `at`: positions it wrote to, from the first new token, with their `tokens` and `text`; `edited`:
    those that held a token before. `final`: how many tokens no later step changes.
    """

    nfe: int
    at: list[int]
    tokens: list[int]
    text: list[str]
    edited: list[int]
    final: int
    seconds: float


class Done(Reply):
    """The text, and as `pieces` for its tokens."""

    text: str
    pieces: list[str]
    finish_reason: Reason
    usage: Usage
    seconds: float
    tokens_per_second: float


class Scored(Reply):
    nats: float
    error: float
    tokens: int
    greedy: bool | None


class ScoreAnswer(Reply):
    object: Literal["list"] = "list"
    model: str
    data: list[Scored]


class Facts(Reply):
    """`reproducible`: whether a seed is a promise; `promise`: what it promises."""

    samplers: list[str]
    block_sizes: list[int]
    default_sampler: str
    context: int
    precision: str
    reproducible: bool
    promise: str
    chat: bool


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    blockdiff: Facts


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class State(Reply):
    status: str


def _data(kind: type[Reply]) -> dict[str, Any]:
    """The text of an event's data: JSON."""
    described = {"$ref": _REFS.format(model=kind.__name__)}
    return {"type": "string", "contentMediaType": "application/json", "contentSchema": described}


def _stream(*events: dict[str, Any]) -> dict[str, Any]:
    kinds = [{"type": "object", "properties": one, "required": ["data"]} for one in events]
    return {"text/event-stream": {"itemSchema": {"anyOf": kinds}}}


def chunks(kind: type[Reply]) -> dict[str, Any]:
    """The stream of OpenAI's routes: chunks, an error where it breaks off, and `[DONE]`."""
    return _stream(
        {"data": _data(kind)}, {"data": _data(ErrorAnswer)}, {"data": {"const": "[DONE]"}}
    )


def denoising() -> dict[str, Any]:
    """The stream of `/v1/denoise`."""
    kinds: dict[str, Any] = {"start": Start, "step": Step, "done": Done, "error": ErrorAnswer}
    events = ({"event": {"const": name}, "data": _data(kind)} for name, kind in kinds.items())
    return _stream(*events)


def described() -> dict[str, Any]:
    """The models of the streams' events by name, for the schema's components."""
    kinds: list[Any] = [CompletionChunk, ChatChunk, Start, Step, Done]
    models = [(kind, "serialization") for kind in kinds]
    found: dict[str, Any] = models_json_schema(models, ref_template=_REFS)[1]["$defs"]  # type: ignore[arg-type]
    return found
