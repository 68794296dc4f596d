"""Texts that obey a rule: a regular expression, a JSON schema, a list of choices.

    constraint = constrain(tokenizer, regex="[0-9]{4}")    what may be written, checked and compiled
    automaton = constraint.begin()                         of one row: where its text stands
    automaton.allowed()                                    bool [V]: the tokens that may come next

An automaton is asked from left to right, so the positions of such a row are fixed in that order:
one it cannot reach yet waits for those before it (`sampling.guides`). The compiler is llguidance;
an object of one's own with `begin` does as well, and nothing else here knows which it is.

An order that verifies drafted tokens asks `allowed_along`, or for all that guides a row
`RowGuides.along`, which changes the logits of each drafted position by what may stand there after
the drafts before it: the target distribution of speculative sampling, masked and renormalised
position by position. It then hands the engine its accepted tokens; the engine advances the row's
automaton by them and ends the row where nothing can follow.

Shapes: V vocabulary, k drafted tokens.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from blockdiff.categorical import Array
from blockdiff.errors import InputError, first_line, need


class Automaton(Protocol):
    """Where one row's new text stands.

    `accepting`: whether it may end here. `finished`: whether nothing may follow but its end.
    """

    @property
    def accepting(self) -> bool: ...
    @property
    def finished(self) -> bool: ...

    def allowed(self) -> Array:
        """bool [V]: the tokens that may come next, the end-of-text token where it is accepting."""
        ...

    def advance(self, token: int) -> None:
        """Takes the next token; raises `InputError` for one that is not allowed."""
        ...

    def copy(self) -> Automaton:
        """Another one at the same place."""
        ...


class Constraint(Protocol):
    """What new text has to obey, for any number of rows."""

    def begin(self) -> Automaton:
        """The automaton of a row without new text."""
        ...


def allowed_along(automaton: Automaton, drafts: Sequence[int]) -> Array:
    """What may stand at each of k drafted positions and at the one after them: bool [k + 1, V].

    Row i is for what comes after the text so far and drafts[:i]; `automaton` is left as it is.
    Rows behind a draft that is not allowed, or behind the text's end, are the same as the last that
    counts: a verifying order refuses that draft, whose probability is 0, or its row is finished.

    Example:
        >>> import blockdiff
        >>> from blockdiff.sampling.constraints import allowed_along, constrain
        >>> model, tokenizer = blockdiff.load("starter")
        >>> year = constrain(tokenizer, regex="[0-9]{4}").begin()
        >>> allowed = allowed_along(year, tokenizer.encode("19"))
        >>> len(allowed), [int(row[tokenizer.encode("x")[0]]) for row in allowed]
        (2, [0, 0])
    """
    ahead, found = automaton.copy(), [automaton.allowed()]
    for token in drafts:
        if not found[-1][token] or ahead.finished:
            break
        ahead.advance(token)
        if ahead.finished:
            break
        found.append(ahead.allowed())
    return np.stack(found + found[-1:] * (len(drafts) + 1 - len(found)))


def constrain(
    tokenizer: Any,
    *,
    regex: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    choices: Sequence[str] | str | None = None,
    vocab_size: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    banned: Sequence[int] = (),
) -> Constraint:
    """What new text has to match as a whole, compiled for a tokenizer; exactly one of the three.

    `regex`: \\d, \\w and \\s mean ASCII. `json_schema`: a schema, its text, or the path of a file
    with one; objects are written without free white space. `vocab_size`: the model's, where it is
    not the tokenizer's. `eos_token_id`: what ends a text, the tokenizer's by default. `banned`: ids
    that are never allowed. Raises `InputError` for what nothing can match, what the library
    refuses, and tokenizers that it does not know or that cannot spell every text.

    Example:
        >>> import blockdiff
        >>> from blockdiff.sampling.constraints import constrain
        >>> model, tokenizer = blockdiff.load("starter")
        >>> answer = constrain(tokenizer, choices=["yes", "no"])
        >>> options = blockdiff.SamplingOptions(constraint=answer, max_new_tokens=8)
        >>> blockdiff.generate(
        ...     model, "So it is:", tokenizer=tokenizer, options=options
        ... ).texts[0] in ("yes", "no")
        True
    """
    given = {"regex": regex, "json_schema": json_schema, "choices": choices}
    name = only_one({name: value for name, value in given.items() if value is not None})
    library = _library()
    if name == "json_schema":
        shown, grammar = "the schema", _of_schema(library, json_schema)
    else:
        shown = "the regular expression" if name == "regex" else "the list of choices"
        pattern = _pattern(regex) if regex is not None else _of_choices(choices or ())
        pattern = library.lark(pattern, "dws")
        grammar = library.LLMatcher.grammar_from_lark(f"start: /{pattern}/")
    vocabulary = _vocabulary(library, tokenizer, vocab_size, eos_token_id, banned)
    return _Compiled(library, vocabulary, grammar, f"`{name}`: {shown}")


def only_one(given: Mapping[str, Any]) -> str:
    """The name of the only thing that is given; raises `InputError` for more."""
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(f'`{name}`' for name in given) or 'no constraint'}: give exactly one "
            "of `regex`, `json_schema` and `choices`"
        )
    return next(iter(given))


def _library() -> Any:
    library = need("llguidance", "llguidance.hf", extra="constrain", what="a constraint")
    return SimpleNamespace(
        LLMatcher=library.LLMatcher,
        lark=library._lib.regex_to_lark,
        of_hf=library.hf.from_tokenizer,
    )


class _Vocabulary:
    """A tokenizer as the library knows it; `never` bool [V]: what no text may hold."""

    def __init__(self, tokenizer: Any, never: Array, ends: list[int]) -> None:
        self.tokenizer, self.never, self.ends = tokenizer, never, ends


_KNOWN: WeakKeyDictionary[Any, dict[Any, _Vocabulary]] = WeakKeyDictionary()


def _vocabulary(
    library: Any,
    tokenizer: Any,
    vocab_size: int | None,
    eos_token_id: int | Sequence[int] | None,
    banned: Sequence[int],
) -> _Vocabulary:
    """Made once for each tokenizer: of a large one it takes a second."""
    if tokenizer is None:
        raise InputError("a constraint needs the model's tokenizer; give `tokenizer`")
    size = len(tokenizer) if vocab_size is None else max(vocab_size, len(tokenizer))
    ends = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else sorted(ends)
    known = _KNOWN.setdefault(tokenizer, {})
    key = (size, tuple(ends), tuple(banned))
    if key not in known:
        known[key] = _read(library, tokenizer, size, ends, banned)
    return known[key]


def _read(
    library: Any, tokenizer: Any, size: int, ends: list[int], banned: Sequence[int]
) -> _Vocabulary:
    try:
        made = library.of_hf(tokenizer, n_vocab=size, eos_token=ends or None)
    except Exception as error:  # the library's own types are its own
        raise InputError(
            "constraints do not know this kind of tokenizer (byte-level BPE and SentencePiece with "
            f"bytes work): {first_line(error)[:120]}"
        ) from None
    special = {*tokenizer.all_special_ids, *banned, *range(len(tokenizer), size)}
    never = np.zeros(size, bool)
    never[list(special)] = True
    never |= np.array([made.is_special_token(token) for token in range(size)])
    # With every byte of UTF-8 there is no beginning that the vocabulary could not go on with.
    bytes_ = {made.decode_bytes([token]) for token in (~never).nonzero()[0].tolist()}
    every = {*range(0xC0), *range(0xC2, 0xF5)}
    missing = sorted(every - {one[0] for one in bytes_ if len(one) == 1})
    if missing:
        raise InputError(
            f"constraints need a tokenizer that can spell every text; this one has no token for "
            f"the byte 0x{missing[0]:02X} alone"
        )
    never[ends] = True  # allowed by hand, where a text may end
    return _Vocabulary(made, never, [end for end in ends if end < size])


def follow(automaton: Automaton, tokens: Sequence[int]) -> int | None:
    """Advances by new tokens of a row; how many of them make up its text, where they end it."""
    for taken, token in enumerate(tokens, 1):
        automaton.advance(token)
        if automaton.finished:
            return taken
    return None


class _Compiled:
    """A grammar for a vocabulary."""

    def __init__(self, library: Any, vocabulary: _Vocabulary, grammar: str, shown: str) -> None:
        """Raises `InputError` where the library refuses it, or nothing can match."""
        self.vocabulary, self.shown = vocabulary, shown
        self._matcher = library.LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
        if self._matcher.is_error():
            raise InputError(f"{shown} is refused: {_reason(self._matcher.get_error())}")
        begin = self.begin()
        try:
            some = begin.allowed()
        except InputError as error:
            if "NoExtension" in str(error):  # the library's word for a language without texts
                raise InputError(f"{shown} allows nothing") from None
            raise
        some = some.sum() - some[vocabulary.ends].sum()
        if not some:
            what = "only the empty text" if begin.accepting else "nothing"
            raise InputError(f"{shown} allows {what}")

    def begin(self) -> _Matching:
        return _Matching(self._matcher.deep_copy(), self.vocabulary, self.shown)


class _Matching:
    """An `Automaton` of the library's."""

    def __init__(self, matcher: Any, vocabulary: _Vocabulary, shown: str) -> None:
        self._matcher, self._vocabulary, self._shown = matcher, vocabulary, shown
        self._allowed: Array | None = None

    @property
    def accepting(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Array:
        if self._allowed is None:
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            never = self._vocabulary.never
            self._allowed = np.unpackbits(found, count=len(never), bitorder="little") > never
            self._allowed[self._vocabulary.ends] = self.accepting
            self._refuse_errors()
        return self._allowed

    def advance(self, token: int) -> None:
        vocabulary = self._vocabulary
        known = 0 <= token < len(vocabulary.never)
        known = known and (not vocabulary.never[token] or token in vocabulary.ends)
        if not (known and self._matcher.consume_token(token)):
            raise InputError(f"{self._shown} does not allow the token {token} there")
        self._allowed = None

    def copy(self) -> _Matching:
        made = _Matching(self._matcher.deep_copy(), self._vocabulary, self._shown)
        made._allowed = self._allowed
        return made

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"{self._shown} is refused: {_reason(self._matcher.get_error())}")


def _reason(message: str) -> str:
    """The library's reason, in a line: of a parser's report the line that begins with `error:`."""
    found = re.search(r"^\s*error: (.*)$", message, re.MULTILINE)
    return found[1] if found else re.sub(r"^at \d+\(\d+\): ", "", message.strip().splitlines()[0])


def _pattern(regex: str) -> str:
    """A regular expression that Python and the library read alike; anchors at its ends go."""
    if not isinstance(regex, str):
        raise InputError(f"`regex` is {type(regex).__name__}; it must be text")
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", regex, flags=re.DOTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        try:
            re.compile(regex)
        except FutureWarning as warning:
            raise InputError(f"`regex` is ambiguous: {first_line(warning)}") from None
        except (re.error, RecursionError, OverflowError):
            pass  # what Python has no name for, such as \p{Lu}, the library may know
    if re.search(r"[*+?}]\+", bare):
        raise InputError("`regex` is ambiguous: possessive quantifiers are not supported")
    regex = regex.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", regex):
        regex = regex[:-1]
    return regex


def _of_choices(choices: Sequence[str] | str) -> str:
    listed = [choices] if isinstance(choices, str) else list(choices)
    if not listed or not all(isinstance(one, str) and one for one in listed):
        raise InputError("`choices` must be texts, none of them empty; give at least one")
    return "|".join(f"(?:{re.escape(one)})" for one in listed)


def read_schema(schema: Mapping[str, Any] | str) -> Any:
    """A schema, its text or what is in the file of that name; raises `InputError` for no JSON."""
    if not isinstance(schema, str):
        return schema
    where, text = "", schema
    if not schema.lstrip().startswith("{"):
        where = f" in {schema}"
        try:
            text = Path(schema).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise InputError(
                f"`json_schema`: {schema[:80]!r} is neither a JSON object nor a file that can be "
                f"read: {first_line(error)}"
            ) from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"`json_schema`: no JSON{where}: {first_line(error)}") from None


def _of_schema(library: Any, schema: Mapping[str, Any] | str | None) -> Any:
    found = read_schema(schema or {})
    if not isinstance(found, Mapping):
        raise InputError(f"`json_schema` is {type(found).__name__}; a schema is a JSON object")
    try:
        return library.LLMatcher.grammar_from_json_schema(
            json.dumps(found),
            overrides={
                "whitespace_flexible": False,
                "item_separator": ",",
                "key_separator": ":",
                "lenient": False,
            },
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"`json_schema`: the schema is refused: {first_line(error)}") from None
