"""`blockdiff chat`."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff.commands.model import ModelOptions
from blockdiff.commands.options import Command, Given
from blockdiff.errors import InputError
from blockdiff.evaluation.options import Precision
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a model.

    Attributes:
        system: What the system says before the conversation.
        chat_template: File with the chat template (Jinja) to write messages by, in place of the
            tokenizer's own; a model without one is talked to in plain lines, "User: …".
        show_denoising: Show the block that is being denoised, in a terminal; /denoising switches.
        delay: Seconds to wait after each step that is shown.
        precision: Weights: float32, bf16, int8 (fastest for one text on a CPU), or auto (bf16
            where the processor is made for it).
        tokenizer: Folder or hub id of the tokenizer, where the model has none.
        json: Print one JSON object an answer and line, with content, nfe, tokens, seconds
            and tokens_per_nfe.
    """

    system: str | None = None
    chat_template: str | None = None
    show_denoising: bool = False
    delay: float = 0.0
    precision: Precision = "auto"
    tokenizer: str | None = None
    json: bool = False


@dataclass(frozen=True)
class ChatSampling(SamplingOptions):
    """How answers are sampled; one that comes to its end is shorter.

    Attributes:
        max_new_tokens: Tokens of an answer, at most half of the context.
        stop: What ends an answer beside the end of its turn, which always does.
    """

    max_new_tokens: int = 512


def _run(given: Given) -> None:
    wish, options = given.make(ChatOptions), given.make(ChatSampling)
    if options.logprobs:
        raise InputError("`logprobs` are shown by generate only; leave it out")
    from blockdiff.chat import chat

    model = given.make(ModelOptions)
    chat(model.model, wish, options, device=model.device, told=given.named, **model.opening)


COMMAND = Command(
    summary="Talk with a model.",
    kinds=(ModelOptions, ChatOptions, ChatSampling),
    run=_run,
    places=("model",),
    sections={"model": "Model", "system": "Conversation", "max_new_tokens": "Sampling"},
    examples=(
        "blockdiff chat runs/smol",
        'blockdiff chat runs/smol --system "Answer in one sentence." --show-denoising',
        "blockdiff chat runs/smol --chat-template chatml.jinja --temperature 0.7",
        "cat questions.txt | blockdiff chat runs/smol --json > answers.jsonl",
    ),
)
