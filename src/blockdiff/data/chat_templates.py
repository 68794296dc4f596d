"""Messages as the tokens of a conversation, by a chat template (Jinja, as transformers has it).

    [{"role": "user", "content": "Hello"}]  →  <user> Hello <end> <bot>

Training, `blockdiff chat` and a server write conversations here, so that a model is asked as it was
trained. What a message spells out stays what it says: "<|im_end|>" typed by a user is ten
characters, not the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blockdiff.data.tokenizers import bos_id
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import local_path

Message = Mapping[str, Any]  # with a role and a content

# For a tokenizer without a template.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Parts a special token that a message spells out, so that it is encoded as the characters it is.
# No text holds it: Unicode keeps it free of meaning.
SEAM = "\ufdd0"
# What is said to a template to see what it writes.
_HELLO, _ANSWER, _REPLY = "Hello", "probe-answer", "probe-reply"


class TurnEnd(NamedTuple):
    """What ends an answer: one of the tokens `ids`, or the words `text` where it is not empty."""

    ids: frozenset[int]
    text: str


class Encoder:
    """Encodes texts in which a special token that is spelt out stays the text it is.

    `split`: all of a text is taken so; else what stands behind a `SEAM`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split: bool = False) -> None:
        self.tokenizer, self.split = tokenizer, split
        added = tokenizer.added_tokens_decoder
        special = [str(token) for token in added.values() if token.special]
        self.special_ids = {i for i, token in added.items() if token.special}
        self.special_ids |= set(tokenizer.all_special_ids)
        long = [re.escape(word) for word in sorted(special, key=len, reverse=True) if word[1:]]
        self._special = re.compile("|".join(long) or "(?!)")  # which matches nothing
        self._newline = self._ids("\n")

    def apart(self, text: str) -> str:
        """A text with a seam in each special token that it spells out."""
        text = text.replace(SEAM, "")
        return self._special.sub(lambda found: found[0][:1] + SEAM + found[0][1:], text)

    @property
    def beginning(self) -> list[int]:
        """What a document begins with before its text, as a prompt that is sampled from does."""
        first = bos_id(self.tokenizer)
        return [] if first is None else [first]

    def encode(self, text: str, first: bool = False) -> Iterator[int]:
        """The ids of the beginning of a document, or of what follows it, encoded apart from it.

        So is a prompt that is sampled from. A text that follows is encoded behind a newline, which
        is then taken away: some tokenizers put a space before each beginning.
        """
        for part in filter(None, text.split(SEAM)):
            if not first:
                ids = self._ids("\n" + part)
                if ids[: len(self._newline)] == self._newline:
                    yield from ids[len(self._newline) :]
                    continue
            first = False
            yield from self._ids(part)

    def _ids(self, text: str) -> list[int]:
        encoding = self.tokenizer(
            [text], add_special_tokens=False, split_special_tokens=self.split,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        found: list[int] = encoding["input_ids"][0]
        return found


class ChatTemplate(Encoder):
    """A tokenizer with what writes its conversations.

    Args:
        tokenizer: of the model.
        template: Jinja text; the tokenizer's own when left out.

    Raises:
        InputError: there is no template, or it does not write a user's message.

    Example:
        >>> import blockdiff
        >>> from blockdiff.data.chat_templates import PLAIN, ChatTemplate
        >>> _, tokenizer = blockdiff.load("starter")
        >>> template = ChatTemplate(tokenizer, PLAIN)
        >>> template.render([{"role": "user", "content": "Hello"}], answer=True)
        'User: Hello\\nAssistant:'
        >>> template.turn_end.text
        '\\nUser:'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        super().__init__(tokenizer)
        if template is None and tokenizer.chat_template is None:
            raise InputError(
                "the tokenizer has no chat template; use one that has, or name a file with one as "
                "`chat_template`"
            )
        self.template = template
        if _HELLO not in self.render([{"role": "user", "content": _HELLO}], answer=True):
            raise InputError(
                "the chat template leaves out what a user says; name another one as `chat_template`"
            )

    @property
    def beginning(self) -> list[int]:
        """Nothing where a template writes a beginning of its own."""
        return super().beginning if self.template == PLAIN else []

    def render(self, messages: Sequence[Message], answer: bool = False) -> str:
        """The text of messages; with `answer`, up to where the model's answer begins.

        Seams stand in special tokens that the messages spell out. Raises `InputError` for messages
        that the template refuses.
        """
        told = [{**one, "content": self.apart(one["content"])} for one in messages]
        try:
            found = self.tokenizer.apply_chat_template(
                told, chat_template=self.template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # a template raises what it likes
            start = str(messages[0]["content"])[:40]
            raise InputError(
                f"the chat template cannot write the conversation {start!r}...: {first_line(error)}"
            ) from error
        return str(found)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of messages up to where the model's answer begins."""
        return [*self.beginning, *self.encode(self.render(messages, answer=True), first=True)]

    def fit(self, messages: Sequence[Message], room: int) -> tuple[list[Message], list[int]]:
        """Messages without the oldest turns, and their `prompt`, which takes at most `room` tokens.

        A turn is a user's message with what follows it; what the system says stays. Raises
        `InputError` where the last turn alone does not fit.
        """
        kept = list(messages)
        while len(ids := self.prompt(kept)) > room:
            turns = [i for i, message in enumerate(kept) if message["role"] == "user"]
            if len(turns) < 2:
                raise InputError(
                    f"the message takes {len(ids)} tokens with what the template adds, and there "
                    f"is room for {room}: shorten it, or lower `max_new_tokens`"
                )
            said = [message for message in kept[: turns[1]] if message["role"] == "system"]
            kept = said + kept[turns[1] :]
        return kept, ids

    @cached_property
    def turn_end(self) -> TurnEnd:
        """What the template puts between an answer and the message that follows it.

        Its first special token; of a template that writes none, the words that end the answer or
        else begin the next message. Raises `InputError` for a template that refuses a second one.
        """
        said = (("user", _HELLO), ("assistant", _ANSWER), ("user", _REPLY))
        messages = [{"role": role, "content": content} for role, content in said]
        between = self.render(messages).partition(_ANSWER)[2].partition(_REPLY)[0]
        special = [token for token in self.encode(between) if token in self.special_ids]
        if special:
            return TurnEnd(frozenset(special[:1]), "")
        own = self.render(messages[:2]).partition(_ANSWER)[2].strip()
        return TurnEnd(frozenset(), own or between.rstrip(" "))


def read_template(path: str) -> str:
    """A file's chat template; raises `InputError` where it cannot be read."""
    file = local_path("chat_template", path)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`chat_template` {file}: {first_line(error)}") from None
