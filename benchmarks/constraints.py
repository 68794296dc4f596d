"""Random rules, obeyed: regular expressions and JSON schemas through several orders; their cost.

    python benchmarks/constraints.py [--regexes 1000] [--schemas 300] [--model starter] [--seed 0]

Every finished text is checked by Python's `re.fullmatch`, or by the validator below and for free
white space. One that the limit cut off is checked by partial matching (package `regex`), of a
schema by an automaton walked anew. What does not obey is written into the record, and the exit
status is 1. Cost: milliseconds of the host in the automaton (what may come next, its copies, its
advances) per new token of the constrained rows, and per constraint to compile it; beside it the
same rows without constraints.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import regex
import torch

import blockdiff
from blockdiff.api import continuation
from blockdiff.errors import InputError
from blockdiff.sampling.constraints import constrain

RESULTS = Path(__file__).parent / "results" / "constraints.json"
ORDERS: list[dict[str, Any]] = [
    {"sampler": "first_hitting"},
    {"sampler": "ancestral", "steps": 2},
    {"sampler": "confidence", "tokens_per_step": 2},
    {"sampler": "threshold", "threshold": 0.5},
    {"sampler": "margin", "margin": 0.5},
    {"sampler": "entropy_bound", "entropy_bound": 0.5},
    {"sampler": "editing", "threshold": 0.5},
    {"sampler": "verified"},
]
PROMPT = "The people of the United States"


# random rules


def random_regex(draw: random.Random, depth: int = 3) -> str:
    """A regular expression that Python and the library read alike."""
    kind = draw.random()
    if depth == 0 or kind < 0.3:
        atom = draw.choice(
            ["a", "b", "Q", "7", " ", "_", "é", "ß", "日", r"\.", r"\$", r"\[", r"\\", r"\d", r"\w",
             r"\s", r"\D", "[a-f]", "[0-9x]", "[^a-z]", "[A-Z ]", r"[\]\-]", r"[^\s]", "the", " of"]
        )  # fmt: skip
        return atom
    if kind < 0.6:
        return "".join(random_regex(draw, depth - 1) for _ in range(draw.randint(2, 4)))
    inner = random_regex(draw, depth - 1)
    if kind < 0.8:
        return "(?:" + "|".join([inner, random_regex(draw, depth - 1)]) + ")"
    low = draw.randint(0, 2)
    times = draw.choice(["?", "*", "+", f"{{{low}}}", f"{{{low},{low + draw.randint(1, 4)}}}"])
    return f"(?:{inner}){times}"


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A JSON schema of the words that `valid` knows."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kinds += ["object", "array", "anyOf"] * (depth > 0)
    kind = draw.choice(kinds)
    if kind == "string":
        schema: dict[str, Any] = {"type": "string"}
        if draw.random() < 0.3:
            schema["pattern"] = draw.choice(["^[a-z]{1,5}$", "^(on|off)$", r"^\d{2}-\d{2}$"])
        elif draw.random() < 0.8:
            schema["minLength"] = draw.randint(0, 3)
            schema["maxLength"] = schema["minLength"] + draw.randint(0, 6)
        return schema
    if kind in ("integer", "number"):
        low = draw.randint(-50, 50)
        limits = {"minimum": low, "maximum": low + draw.randint(0, 500)}
        return {"type": kind, **(limits if draw.random() < 0.7 else {})}
    if kind == "enum":
        values = [1, -2.5, "yes", "no é", None, True, [1, "a"], {"k": 0}]
        return {"enum": draw.sample(values, draw.randint(1, 4))}
    if kind == "const":
        return {"const": draw.choice([0, "fixed text", [True, None], {"a": {"b": []}}])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "array":
        low = draw.randint(0, 2)
        items = random_schema(draw, depth - 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind == "object":
        names = draw.sample(["id", "name", "x y", "naïve", "a", "b"], draw.randint(1, 3))
        properties = {name: random_schema(draw, depth - 1) for name in names}
        required = [name for name in names if draw.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required,
                "additionalProperties": False}  # fmt: skip
    return {"type": kind}


# whether a text obeys


def same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and bool(one == other)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(same(value, one) for one in schema["enum"])
    if "const" in schema:
        return same(value, schema["const"])
    kind = schema["type"]
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        number = isinstance(value, int if kind == "integer" else int | float)
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return number and not isinstance(value, bool) and low <= value <= high
    if kind == "string":
        if not isinstance(value, str):
            return False
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
        return fits and re.search(schema.get("pattern", ""), value) is not None
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(valid(one, schema["items"]) for one in value)
    known = schema["properties"]
    fits = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(known)
    return fits and all(valid(one, known[name]) for name, one in value.items())


def obeys(rule: Any, text: str) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, text, re.ASCII) is not None
    try:
        outside = re.sub(r'"(?:\\.|[^"\\])*"', "", text)
        return valid(json.loads(text), rule) and not re.search(r"\s", outside)
    except ValueError:
        return False


class Timed:
    """A constraint whose automata tell how long they take."""

    def __init__(self, constraint: Any) -> None:
        self.constraint, self.seconds = constraint, 0.0

    def begin(self) -> TimedAutomaton:
        return TimedAutomaton(self, self.constraint.begin())


class TimedAutomaton:
    def __init__(self, owner: Timed, automaton: Any) -> None:
        self.owner, self.automaton = owner, automaton

    accepting = property(lambda self: self.automaton.accepting)
    finished = property(lambda self: self._timed(lambda: self.automaton.finished))

    def allowed(self) -> Any:
        return self._timed(self.automaton.allowed)

    def advance(self, token: int) -> None:
        self._timed(lambda: self.automaton.advance(token))

    def copy(self) -> TimedAutomaton:
        return TimedAutomaton(self.owner, self._timed(self.automaton.copy))

    def _timed(self, call: Any) -> Any:
        begin = time.perf_counter()
        try:
            return call()
        finally:
            self.owner.seconds += time.perf_counter() - begin


def rules(count: int, draw: random.Random, make: Any, compiled: Any) -> list[tuple[Any, Timed]]:
    """So many that the library takes; those it refuses are drawn anew, and counted."""
    found: list[tuple[Any, Timed]] = []
    while len(found) < count:
        rule = make(draw)
        begin = time.perf_counter()
        try:
            constraint = compiled(rule)
        except InputError as error:
            REFUSED[str(error).partition("refused: ")[2] or str(error)] += 1
            continue
        COMPILED.append(time.perf_counter() - begin)
        found.append((rule, Timed(constraint)))
    return found


REFUSED: Counter[str] = Counter()
COMPILED: list[float] = []


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--regexes", type=int, default=1000)
    options.add_argument("--schemas", type=int, default=300)
    options.add_argument("--model", default="starter")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--batch", type=int, default=50)
    options.add_argument("--max-new-tokens", type=int, default=64)
    given = options.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = blockdiff.load(given.model, device="cpu")
    prompt = [tokenizer.bos_token_id or 0, *tokenizer.encode(PROMPT, add_special_tokens=False)]
    draw, size = random.Random(given.seed), model.config.vocab_size
    how = {"vocab_size": size, "banned": [model.config.mask_token_id]}
    named = {
        "regex": rules(
            given.regexes, draw, random_regex, lambda rule: constrain(tokenizer, regex=rule, **how)
        ),
        "json_schema": rules(
            given.schemas,
            draw,
            random_schema,
            lambda rule: constrain(tokenizer, json_schema=rule, **how),
        ),
    }
    orders = []
    for order in ORDERS:
        try:
            blockdiff.Engine(model).admit(prompt, blockdiff.SamplingOptions(**order))
            orders.append(order)
        except InputError as error:
            print(f"left out, {order['sampler']}: {error}", flush=True)
    record: dict[str, Any] = {}
    wrong: list[Any] = []
    for name, every in named.items():
        finish: Counter[str] = Counter()
        by_order: dict[str, Any] = {
            order["sampler"]: {"texts": 0, "finished": 0, "tokens": 0, "nfe": 0} for order in orders
        }
        spent = tokens = 0.0
        for start in range(0, len(every), given.batch):
            engine, part = blockdiff.Engine(model), every[start : start + given.batch]
            chosen = [orders[(start + i) % len(orders)] for i in range(len(part))]
            for number, ((_, constraint), order) in enumerate(zip(part, chosen, strict=True)):
                wish = blockdiff.SamplingOptions(
                    constraint=constraint, max_new_tokens=given.max_new_tokens,
                    seed=given.seed, **order,
                )  # fmt: skip
                engine.admit(prompt, wish, start + number)
            begin = time.perf_counter()
            while engine.active:
                step = engine.step()
            spent += time.perf_counter() - begin
            for row, ((rule, constraint), order) in enumerate(zip(part, chosen, strict=True)):
                new = step.tokens[row, len(prompt) : step.lengths[row]].tolist()
                stopped = bool(step.stopped[row])
                text = continuation(tokenizer, prompt, new)
                ends = bool(new) and new[-1] == model.config.eos_token_id
                finish["eos" if ends else "stop" if stopped else "length"] += 1
                own = by_order[order["sampler"]]
                own["texts"] += 1
                own["finished"] += stopped
                own["tokens"] += len(new)
                own["nfe"] += int(step.nfe[row])
                tokens += len(new)
                good = obeys(rule, text) if stopped else begins(rule, constraint, new, text)
                if not good:
                    wrong.append({"rule": rule, "text": text, "finished": stopped, **order})
            print(f"{name}: {start + len(part)} of {len(every)}", flush=True)
        masks = sum(constraint.seconds for _, constraint in every)
        record[name] = {
            "rules": len(every),
            "finish": dict(finish),
            "not obeyed": sum(isinstance(one["rule"], str) == (name == "regex") for one in wrong),
            "tokens": int(tokens),
            "automaton ms per token": 1000 * masks / max(tokens, 1),
            "all ms per token": 1000 * spent / max(tokens, 1),
            "orders": by_order,
        }
    milliseconds = 1000 * np.array(COMPILED)
    record |= {
        "model": given.model,
        "vocabulary": size,
        "seed": given.seed,
        "max_new_tokens": given.max_new_tokens,
        "batch": given.batch,
        "compile ms": {
            "median": float(np.median(milliseconds)),
            "p99": float(np.quantile(milliseconds, 0.99)),
        },
        "refused and drawn anew": dict(REFUSED.most_common(8)),
        "without": without(model, prompt, orders, given),
        "violations": wrong[:20],
        "versions": {
            "llguidance": version("llguidance"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = ("rules", "finish", "not obeyed", "automaton ms per token", "all ms per token")
    for name in named:
        print(name, {key: record[name][key] for key in shown})
    sys.exit(bool(wrong))


def begins(rule: Any, constraint: Timed, new: list[int], text: str) -> bool:
    """Whether a text that was cut off is the beginning of one that obeys."""
    if isinstance(rule, str):
        whole = text.rstrip("\ufffd")  # a character whose bytes are cut off
        return regex.fullmatch(rule, whole, regex.ASCII, partial=True) is not None
    automaton = constraint.constraint.begin()
    for token in new:
        if not automaton.allowed()[token]:
            return False
        automaton.advance(token)
    return not automaton.finished


def without(model: Any, prompt: list[int], orders: list[dict[str, Any]], given: Any) -> Any:
    """The same batch without constraints, of as many tokens as may be."""
    engine = blockdiff.Engine(model)
    for number in range(given.batch):
        order = orders[number % len(orders)]
        wish = blockdiff.SamplingOptions(
            max_new_tokens=given.max_new_tokens, seed=given.seed, stop="none", **order
        )
        engine.admit(prompt, wish, number)
    begin = time.perf_counter()
    while engine.active:
        engine.step()
    spent = time.perf_counter() - begin
    return {"all ms per token": 1000 * spent / (given.batch * given.max_new_tokens)}


if __name__ == "__main__":
    main()
