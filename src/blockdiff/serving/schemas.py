"""What requests hold. Fields beyond OpenAI's are those of `SamplingOptions`.

Fields that are not known are ignored, as OpenAI's older endpoints do; those that would change what
is meant (tools, penalties by frequency, other programs' ambiguous step counts) are refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blockdiff.errors import InputError
from blockdiff.sampling.options import ALIASES, AMBIGUOUS, SamplingOptions
from blockdiff.serving.errors import Refused

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# Fields that do not hold what those of `SamplingOptions` do, or are told elsewhere.
_OWN = ("stop", "seed", "logit_bias", "logprobs")
# Fields of OpenAI's that are refused unless they say what is done anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "suffix": ("",),
    "function_call": ("none", "auto"), "echo": (False,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "audio": (), "modalities": (["text"],), "prediction": (),
    "logits_processor": (), "constraint": (), "json_schema": (), "max_new_tokens": (),
    "stop_strings": (),
    "min_tokens": (0,), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "structured_outputs": (), "use_beam_search": (False,),
    "top_logprobs": (0,),
}  # fmt: skip


class StreamOptions(BaseModel):
    include_usage: bool = False


class Schema(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)
    name: str | None = None
    given: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`json_object`: any object; `json_schema`: what the schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Body(BaseModel):
    """What every request is: no infinite numbers, and no text that UTF-8 cannot write."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def writable(cls, data: Any) -> Any:
        if not isinstance(data, dict):  # refused by what follows
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair, which is no UTF-8") from None
        return data


class Sampling(Body):
    """What every request that writes text may hold."""

    model: str | None = None
    max_tokens: Positive | None = None
    n: Positive | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Share | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sampler: str | None = None
    block_size: Positive | None = None
    sub_block: Positive | None = None
    steps: Positive | None = None
    tokens_per_step: Positive | None = None
    threshold: Share | None = None
    margin: Share | None = None
    entropy_bound: float | None = None
    remasking: str | None = None
    edit_threshold: Share | None = None
    drafts: Positive | None = None
    drafter: str | None = None
    schedule: str | None = None
    top_k: Positive | None = None
    top_p_rule: str | None = None
    repetition_penalty: float | None = None
    cfg_scale: float | None = None
    # What is looked for in a regular expression takes the square of its length.
    regex: Annotated[str, Field(max_length=4096)] | None = None
    choices: Annotated[list[str], Field(max_length=1024)] | None = None

    def told(self) -> dict[str, Any]:
        """The `SamplingOptions` that are given but for length and seed; `Refused` or `InputError`
        for what is not done here."""
        if self.stream_options is not None and not self.stream:
            raise Refused(400, "`stream_options` is for answers with `stream` true; leave it out",
                          "stream_options", "invalid_value")  # fmt: skip
        extra = self.model_extra or {}
        for name, neutral in _REFUSED.items():
            value = extra.get(name, getattr(self, name, None))
            if value is not None and value not in neutral:
                raise Refused(400, f"`{name}` is not supported; leave it out", name, "unsupported")
        ours = SamplingOptions.__dataclass_fields__.keys() - {*_OWN}
        given = {name: getattr(self, name) for name in type(self).model_fields if name in ours}
        found = {name: value for name, value in given.items() if value is not None}
        found |= {
            name: value
            for name, value in extra.items()
            if value is not None and (name in AMBIGUOUS or name in ALIASES)
            and ALIASES.get(name) != "max_new_tokens"
        }  # fmt: skip
        if self.stop:
            found["stop_strings"] = self.stop
        if self.logit_bias:
            for token in self.logit_bias:
                if not token.isascii() or not token.isdigit():
                    raise InputError(f"`logit_bias` {token[:40]!r} is no id of a token")
            found["logit_bias"] = {int(one[:20]): bias for one, bias in self.logit_bias.items()}
        wish = self.response_format
        if wish is not None and wish.type != "text":
            schema: dict[str, Any] = {"type": "object"}
            if wish.type == "json_schema":
                if wish.json_schema is None or wish.json_schema.given is None:
                    raise Refused(400, "`response_format` of the type json_schema needs "
                                  "`json_schema` with a `schema`", "response_format",
                                  "invalid_value")  # fmt: skip
                schema = wish.json_schema.given
            found["json_schema"] = schema
        return found

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionRequest(Sampling):
    """`prompt`: a text, several, or rows of ids. `logprobs`: 0 or 1 for those of the tokens."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    best_of: Positive | None = None


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Said(BaseModel):
    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def message(self) -> dict[str, str]:
        said = self.content
        text = said if isinstance(said, str) else "".join(part.text for part in said)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    messages: Annotated[list[Said], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


class DenoiseRequest(Sampling):
    """A `prompt`, or the `messages` of a conversation."""

    prompt: str | None = None
    messages: Annotated[list[Said], Field(min_length=1)] | None = None


class ScoreRequest(Body):
    """How likely continuations are, in nats: an upper bound with its standard error."""

    model: str | None = None
    context: str = ""
    continuation: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    estimator: str = "auto"
    draws: Annotated[int, Field(ge=1, le=256)] = 8
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    greedy: bool = False
