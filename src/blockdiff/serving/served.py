"""A model that is served: what a request becomes for its worker."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from blockdiff.data.chat_templates import PLAIN, ChatTemplate, Encoder
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import end_ids
from blockdiff.registry import ORDERS
from blockdiff.sampling.defaults import options_for
from blockdiff.sampling.fitting import check_options
from blockdiff.sampling.guides import bound, bound_to_answer
from blockdiff.sampling.options import SamplingOptions, translated
from blockdiff.serving.worker import Worker

# What a seed promises (docs/serving.md).
PROMISE = (
    "the same request with the same seed gives the same text whatever else runs, as far as float32 "
    "goes: beside other rows a number may be rounded otherwise, and rarely a token differs"
)
NO_PROMISE = "a seed does not promise the same text beside others"


class Served:
    """A model with its tokenizer and worker.

    Prompts are encoded in the one thread of `thread`, with a tokenizer of its own: those of the
    `tokenizers` library may not be set in one thread while another reads them.
    """

    def __init__(
        self,
        name: str,
        model: Denoiser,
        tokenizer: PreTrainedTokenizerBase,
        worker: Worker,
        precision: str = "float32",
        template: str | None = None,
    ) -> None:
        """Raises `InputError` for a chat template that cannot be used, and a folder's bad options.

        `template`: Jinja text in the place of the tokenizer's own.
        """
        self.name, self.model, self.worker, self.precision = name, model, worker, precision
        self.tokenizer, own = tokenizer, copy.deepcopy(tokenizer)
        self.plain = template is None and tokenizer.chat_template is None
        self.template = ChatTemplate(own, PLAIN if self.plain else template)
        self.turn_end = self.template.turn_end
        self.encoder = Encoder(own)
        self.defaults: SamplingOptions = options_for(model, {})
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="blockdiff-encode")
        self.context = model.config.length

    def encode(self, text: str) -> list[int]:
        """A prompt's ids; a special token that the text spells out stays text."""
        ids = [*self.encoder.beginning, *self.encoder.encode(self.encoder.apart(text), first=True)]
        if not ids:
            raise InputError("the tokenizer has no token to begin a text with; give a `prompt`")
        return ids

    def pair(self, context: str, after: str) -> tuple[list[int], list[int]]:
        """The ids of a beginning and of what follows it, blanks between them with the latter."""
        bare = context.rstrip()
        after = context[len(bare) :] + after
        before, whole = self.encode(bare), self.encode(bare + after)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.encode(after)[len(self.encoder.beginning) :]

    def options(self, told: Mapping[str, Any], chat: bool = False) -> SamplingOptions:
        """Sampling options, ready for the worker; raises `InputError` for what cannot be meant."""
        wish: SamplingOptions = options_for(self.model, translated(told))
        if not chat:
            return bound(wish, self.model, self.tokenizer)
        ends = self.turn_end.ids | end_ids(self.model)
        return bound_to_answer(wish, self.model, self.tokenizer, self.turn_end, ends)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the answer begins."""
        return self.template.prompt(messages)

    @property
    def samplers(self) -> list[str]:
        """The orders this model can be sampled in, by name."""
        found = []
        for name in ORDERS:
            needs = dict.fromkeys(ORDERS.words("needs", name), 1)
            try:
                wish = SamplingOptions(sampler=name, **needs)  # type: ignore[arg-type]
                check_options(self.model.config, wish, ORDERS.find(name))
            except InputError:
                continue
            found.append(name)
        return found

    def entry(self, created: int) -> dict[str, Any]:
        """Its entry of the list of models."""
        config = self.model.config
        return {
            "id": self.name, "object": "model", "created": created, "owned_by": "blockdiff",
            "blockdiff": {
                "samplers": self.samplers,
                "block_sizes": list(config.block_sizes),
                "default_sampler": self.defaults.sampler,
                "context": config.length,
                "precision": self.precision,
                "reproducible": self.precision == "float32",
                "promise": PROMISE if self.precision == "float32" else NO_PROMISE,
                "chat": not self.plain,
            },
        }  # fmt: skip
