"""A conversation with a model: a message in, an answer out, a step at a time.

    talk = Conversation(model, tokenizer, ChatTemplate(tokenizer), SamplingOptions())
    reply = talk.ask("Hello")
    for step in reply:
        print(reply.text())
    talk.keep(reply)

What was said is encoded anew for each answer, without the turns that no longer fit the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from blockdiff.api import continuation
from blockdiff.data.chat_templates import ChatTemplate, Message
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import end_ids
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.guides import bound_to_answer
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step
from blockdiff.watch import Timed


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    `tokens`: how many, the end's included. `finish`: "stop" where the model ended it, "length"
    where `max_new_tokens` or the context did, or "interrupted". `dropped`: turns that were left out
    of its prompt for the first time.
    """

    content: str
    nfe: int
    tokens: int
    seconds: float
    finish: str
    dropped: int

    @property
    def tokens_per_nfe(self) -> float:
        return self.tokens / max(self.nfe, 1)


class Reply:
    """An answer while it is written; iterating runs it.

    `prompt`: its ids. `messages`: those in it, the oldest turns left out, of which `dropped` were
    there before.
    """

    def __init__(
        self, talk: Conversation, messages: list[Message], prompt: list[int], dropped: int
    ) -> None:
        self.messages, self.prompt, self.dropped = messages, prompt, dropped
        self._tokenizer, self._mask = talk.tokenizer, talk.model.config.mask_token_id
        self._ends, self._end = talk.ends, talk.template.turn_end.text
        self.longest = min(talk.options.max_new_tokens, talk.context - len(prompt))
        options = replace(talk.options, max_new_tokens=self.longest)
        # Every answer has random numbers of its own: asked again, a model answers anew.
        self.steps = Timed(stream_tokens(talk.model, [prompt], options, [talk.answers]))

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    @property
    def ended(self) -> bool:
        """Whether the answer has come to its end."""
        return self.steps.last is not None and bool(self.steps.last.done[0])

    def ids(self) -> list[int]:
        """The tokens before the first that is masked; all of them once it has ended."""
        if self.steps.last is None:
            return []
        return self.steps.last.final(0, len(self.prompt), self._mask)

    def text(self, whole: bool = False) -> str:
        """What is sure of the text so far; with `whole`, also what more tokens could change.

        That is a character of which the last bytes are missing, what may begin the end of the turn,
        and blanks behind the last word.
        """
        new = self.ids()
        if new and new[-1] in self._ends:
            del new[-1]
        text = continuation(self._tokenizer, self.prompt, new).lstrip()
        if self._end:
            text = text.partition(self._end)[0]
        if not (whole or self.ended):
            text = text.rstrip("\ufffd")
            begun = (n for n in range(len(self._end), 0, -1) if text.endswith(self._end[:n]))
            text = text[: len(text) - next(begun, 0)]
        return text.rstrip()


class Conversation:
    """Messages to and from a model.

    `messages`: what was said and kept. `context`: tokens of a prompt with its answer.
    """

    def __init__(
        self,
        model: Denoiser,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        options: SamplingOptions,
        system: str | None = None,
    ) -> None:
        """`system`: what the system says first. Raises `InputError` where the template cannot."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        model.config.sampling_blocks(options.block_size)
        self.ends, self.context = template.turn_end.ids | end_ids(model), model.config.length
        self.options = bound_to_answer(options, model, tokenizer, template.turn_end, self.ends)
        self.messages: list[Message] = []
        self.answers = 0
        self.instruct(system)

    @property
    def room(self) -> int:
        """How many tokens a prompt may have: an answer keeps at most half of the context."""
        return self.context - min(self.options.max_new_tokens, self.context // 2)

    def instruct(self, system: str | None) -> None:
        """What the system says from now on, None for nothing; raises `InputError` if it cannot."""
        said: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.template.fit([*said, {"role": "user", "content": ""}], self.room)
        self.messages = said + [one for one in self.messages if one["role"] != "system"]

    def reset(self) -> None:
        """Forgets what was said; what the system says stays."""
        self.messages = [one for one in self.messages if one["role"] == "system"]

    def ask(self, text: str) -> Reply:
        """The answer to a message, not begun yet.

        Raises `InputError` for a message that does not fit the context.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the message is not valid UTF-8; type it as UTF-8") from None
        said: list[Message] = [*self.messages, {"role": "user", "content": text}]
        messages, prompt = self.template.fit(said, self.room)
        reply = Reply(self, messages, prompt, _turns(said) - _turns(messages))
        self.answers += 1
        return reply

    def keep(self, reply: Reply) -> Answer:
        """Makes the answer, as far as it is written, part of the conversation.

        One that was interrupted before its first word is forgotten, and so is the message.
        """
        content, new, last = reply.text(whole=True), reply.ids(), reply.steps.last
        if content or reply.ended:
            self.messages = [*reply.messages, {"role": "assistant", "content": content}]
        finish = "interrupted"
        if reply.ended:
            stopped = last is not None and last.stopped is not None and bool(last.stopped[0])
            by_itself = stopped or len(new) < reply.longest
            finish = "stop" if by_itself else "length"
        nfe = 0 if last is None else int(last.nfe[0])
        return Answer(content, nfe, len(new), reply.steps.seconds, finish, reply.dropped)


def _turns(messages: list[Message]) -> int:
    return sum(message["role"] == "user" for message in messages)
