"""Many prompts, or many pairs: JSON lines in, JSON lines out, in the same order.

    {"id": "a", "prompt": "The people"}                        what a line needs
    {"id": "b", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "seed": 3}
    →  {"id": "a", "text": …, "tokens": 128, "nfe": 128, "finish_reason": "length", "seed": 912559}

A line without an id has its number, counted from 1. What is written for a line depends on the line
and the options: its seed, where it gives none, is made of the job's seed and its id. The last digit
of a float also depends on what is computed beside it, and once in thousands of tokens it decides
which one is drawn (docs/precision.md). So that a job comes to the same bytes however often it is
stopped, and however many models work on it, its lines are worked on in units, always the same and
each from its beginning.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from blockdiff import checks
from blockdiff.data.chat_templates import PLAIN, ChatTemplate
from blockdiff.data.lines import Line, Lines, seed_of
from blockdiff.data.rows import Rows
from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import tokens_per_pass
from blockdiff.evaluation.score import check_pair, score_tokens
from blockdiff.jobs import Job
from blockdiff.models.loading import end_ids, load_in
from blockdiff.models.weights import fingerprint
from blockdiff.printing import plain_console
from blockdiff.progress import advance
from blockdiff.registry import ORDERS
from blockdiff.sampling.defaults import filled, options_for, without
from blockdiff.sampling.fitting import check_options, check_prompt
from blockdiff.sampling.guides import bound, bound_to_answer
from blockdiff.sampling.many import Wanted, write_rows
from blockdiff.sampling.options import FROM_PYTHON, SamplingOptions, translated
from blockdiff.sampling.prompts import continuation, encode, encode_pair

MOST_ROWS, LONGEST_UNIT = 32, 64
WAVES = 4  # a unit has so many times as many rows as are written at once
OWN = ("id", "prompt", "messages")  # of a line; everything else is an option
Record = dict[str, Any]
Between = Callable[[int, int], None]


class Task:
    """What makes records of lines.

    `records_each`: records of a line. `unit`: lines that are worked on together. `settings`: what
    makes the records, as a job compares them.
    """

    name = ""
    records_each = unit = 1

    def __init__(
        self, source: str, wish: Any, precision: str, device: str | None,
        few_tokens: bool, opening: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Opens the model, as the command line says."""
        checks.numbers(batch_size=wish.batch_size)
        self.model: Any
        self.model, self.tokenizer, precision = load_in(
            source, precision, device, few_tokens=few_tokens, tokenizer=wish.tokenizer, **opening
        )
        self.settings: Record = {
            "precision": precision, "mask_token_id": self.model.config.mask_token_id,
            "weights": fingerprint(self.model), "weights_dtype": str(self.model.dtype),
        }  # fmt: skip

    def check(self, line: Line) -> None:
        """Raises `InputError` for a line that cannot be worked on."""
        raise NotImplementedError

    def plan(self) -> Record:
        """Attributes that a job keeps to, once all lines are checked: `unit`, and others."""
        raise NotImplementedError

    def keep(self, kept: Mapping[str, Any]) -> None:
        """Takes up what the job was begun with."""
        vars(self).update(kept)

    def records(self, lines: Iterable[Line], between: Between | None = None) -> Iterator[Record]:
        """The lines' records, in their order; `between` as in `sampling.many.write_rows`."""
        raise NotImplementedError


# What makes records elsewhere: (lines) → their records, in order
Elsewhere = Callable[[Iterator[Line]], Iterator[Record]]


def work(job: Job, lines: Lines, task: Task, elsewhere: Elsewhere | None = None) -> None:
    """Writes what is missing of a job's records; says on stderr how far it is, and what it cost.

    All lines are looked at before the first is worked on. Raises `InputError` for one that cannot
    be, an id that is there twice, and as `Job` does.
    """
    count = _checked(lines, task)
    ids = (line.id for line in lines for _ in range(task.records_each))
    settings = {"task": task.name, "file": lines.fingerprint, **task.settings}
    job.begin(settings, ids, kept=task.plan())
    task.keep(job.kept)
    total, before = count * task.records_each, job.done
    first = before // (task.records_each * task.unit) * task.unit
    left = islice(lines, first, None)
    clock, tokens, evaluations = time.perf_counter(), 0, 0

    def fast() -> str:
        seconds = max(time.perf_counter() - clock, 1e-9)
        speed = f"{(job.done - before) / seconds:.1f} lines/s"
        if not tokens:
            return speed
        each = tokens / max(evaluations, 1)
        return f"{speed}, {tokens / seconds:.1f} tokens/s, {each:.2f} an evaluation"

    with advance(f"{job.path.name}", total - before, "lines", speed=fast) as tell:

        def between(fixed: int, rows: int) -> None:
            nonlocal tokens, evaluations
            tokens, evaluations = tokens + fixed, evaluations + rows
            tell(0)
            job.stop()

        if before < total:
            made = elsewhere(left) if elsewhere else task.records(left, between)
            for record in islice(made, before - first * task.records_each, None):
                if elsewhere and "nfe" in record:
                    tokens, evaluations = tokens + record["tokens"], evaluations + record["nfe"]
                job.write([record])
                tell(1)
    job.sync()
    what = f"{job.path}: {total:,} lines" + (f", {before:,} of them from before" if before else "")
    plain_console(stderr=True).print(
        what + (f"; {fast()}" if before < total else ""), style="dim", soft_wrap=True
    )


def _checked(lines: Lines, task: Task) -> int:
    """How many lines there are, all of them good."""
    seen: dict[int | str, int] = {}
    for line in lines:
        if line.id in seen:
            raise InputError(
                f"{line.where}: the id {line.id!r} is that of line {seen[line.id]}, too; give each "
                "line its own"
            )
        seen[line.id] = line.number
        try:
            task.check(line)
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from None
    if not seen:
        raise InputError(f"{lines.path} holds no line to work on")
    return len(seen)


class Writing(Task):
    """Texts of prompts: `blockdiff generate --out`.

    `wish`: `samples`, `precision` (auto is float32, in which a text hardly depends on its company),
    `tokenizer`, `batch_size` (rows at once; by memory when None) and `compile`. A line
    may have any sampling option of its own, which come before `options` (of which only those `told`
    were said, None for all), and these before the folder's.
    """

    name = "generate"

    def __init__(
        self, source: str, wish: Any, options: SamplingOptions, device: str | None = None,
        *, told: Collection[str] | None = None, **opening: Any,
    ) -> None:  # fmt: skip
        checks.numbers(samples=wish.samples)
        precision = "float32" if wish.precision == "auto" else wish.precision
        compiled = getattr(wish, "compile", False)
        super().__init__(source, wish, precision, device, not compiled, opening)
        if compiled:
            self.model.compile_layers()
        names = [f.name for f in fields(SamplingOptions) if f.metadata != FROM_PYTHON]
        self.known = names
        named = names if told is None else set(told).intersection(names)
        self.said = {name: getattr(options, name) for name in named}
        self.options = filled(self.model, options, told)
        shown = {name: getattr(self.options, name) for name in names}
        self.settings |= {k: v for k, v in shown.items() if v is not None}
        self.settings["samples"] = self.records_each = wish.samples
        self.asked, self.longest, self.at_once = wish.batch_size, 1, MOST_ROWS
        self._chat: ChatTemplate | None = None
        self._made = lru_cache(64)(self._options)

    def _options(self, said: str, chat: bool) -> SamplingOptions:
        """What a line's own options, as JSON, come to."""
        told = json.loads(said)
        merged: SamplingOptions = options_for(self.model, {**without(self.said, told), **told})
        if not chat:
            return bound(merged, self.model, self.tokenizer)
        end = self.template.turn_end
        ends = end.ids | end_ids(self.model)
        return bound_to_answer(merged, self.model, self.tokenizer, end, ends)

    @property
    def template(self) -> ChatTemplate:
        if self._chat is None:
            plain = PLAIN if self.tokenizer.chat_template is None else None
            self._chat = ChatTemplate(self.tokenizer, plain)
        return self._chat

    def wanted(self, line: Line) -> tuple[list[int], SamplingOptions, bool]:
        """(the ids of its prompt, its options, whether it is a chat); raises `InputError`."""
        row = line.row
        chat = "messages" in row
        if chat == ("prompt" in row):
            raise InputError("a line needs either 'prompt' or 'messages'")
        told = translated({k: v for k, v in row.items() if k not in OWN and v is not None})
        for name in told.keys() - {*self.known}:
            raise InputError(
                f"{name!r} is no sampling option; a line has {', '.join(OWN)} and any of "
                f"{', '.join(self.known)}"
            )
        seed = told.pop("seed", None)
        options = self._made(json.dumps(told, sort_keys=True), chat)
        seed = seed_of(options.seed, line.id) if seed is None else checks.seed("seed", seed)
        options = replace(options, seed=seed)
        if not chat:
            if not isinstance(row["prompt"], str):
                raise InputError("'prompt' must be text")
            return encode(self.model, row["prompt"], self.tokenizer), options, chat
        messages = json.loads(Rows("chat").document({"messages": row["messages"]}, "the chat"))
        prompt = self.template.prompt(messages)
        room = max(1, self.model.config.length - len(prompt))
        return prompt, replace(options, max_new_tokens=min(options.max_new_tokens, room)), chat

    def check(self, line: Line) -> None:
        prompt, options, _ = self.wanted(line)
        check_options(self.model.config, options, ORDERS.find(options.sampler, "sampler"))
        check_prompt(self.model.config, prompt, options)
        self.longest = max(self.longest, len(prompt) + options.max_new_tokens)

    def plan(self) -> Record:
        room = tokens_per_pass(self.model) // min(self.longest, self.model.config.length)
        at_once = self.asked or max(1, min(MOST_ROWS, room))
        return {"at_once": at_once, "unit": max(1, WAVES * at_once // self.records_each)}

    def records(self, lines: Iterable[Line], between: Between | None = None) -> Iterator[Record]:
        lines = iter(lines)
        while part := list(islice(lines, self.unit)):
            asked = [(line, *self.wanted(line)) for line in part]
            begun = [
                (line, sample, Wanted(prompt, options, sample), chat)
                for line, prompt, options, chat in asked for sample in range(self.records_each)
            ]  # fmt: skip
            made = write_rows(self.model, (row for _, _, row, _ in begun), self.at_once, between)
            for (line, sample, row, chat), done in zip(begun, made, strict=True):
                (tokens,) = done.tokens
                record: Record = {"id": line.id}
                if self.records_each > 1:
                    record["sample"] = sample
                record |= {
                    "text": self._text(row.prompt, tokens, chat), "tokens": len(tokens),
                    "nfe": done.nfe[0], "finish_reason": done.finish[0], "seed": row.options.seed,
                }  # fmt: skip
                if row.options.logprobs and done.path_logprobs is not None:
                    record["logprobs"] = done.path_logprobs[0]
                yield record

    def _text(self, prompt: list[int], new: list[int], chat: bool) -> str:
        if not chat:
            return continuation(self.tokenizer, prompt, new)
        end = self.template.turn_end
        new = new[:-1] if new and new[-1] in end.ids | end_ids(self.model) else new
        text = continuation(self.tokenizer, prompt, new)
        return (text.partition(end.text)[0] if end.text else text).strip()


class Scoring(Task):
    """Likelihoods of pairs: `blockdiff score --out`; `wish` is the command line's `ScoreOptions`.

    A record is its line with what `score` adds.
    """

    name = "score"

    def __init__(self, source: str, wish: Any, device: str | None = None, **opening: Any) -> None:
        super().__init__(source, wish, wish.precision, device, False, opening)
        names = ("estimator", "draws", "timesteps", "seed", "greedy")
        self.how = {name: getattr(wish, name) for name in names}
        self.settings |= self.how | {"block_size": self.model.config.block_size}
        self.asked, self.budget = wish.batch_size, tokens_per_pass(self.model)

    def _ids(self, line: Line) -> tuple[list[int], list[int]]:
        for name in ("context", "continuation"):
            if not isinstance(line.row.get(name), str):
                raise InputError(f"there is no text {name!r}")
        row = line.row
        return encode_pair(self.model, row["context"], row["continuation"], self.tokenizer)

    def check(self, line: Line) -> None:
        check_pair(*self._ids(line), self.model.config.length, line.number)

    def plan(self) -> Record:
        return {"unit": self.asked or LONGEST_UNIT, "budget": self.budget}

    def records(self, lines: Iterable[Line], between: Between | None = None) -> Iterator[Record]:
        lines = iter(lines)
        while part := list(islice(lines, self.unit)):
            before, after = zip(*map(self._ids, part), strict=True)
            found = score_tokens(
                self.model, before, after, batch_size=self.unit, budget=self.budget, **self.how
            )
            for line, one in zip(part, found, strict=True):
                yield {"id": line.id, **line.row, **asdict(one)}
            if between is not None:
                between(0, 0)
