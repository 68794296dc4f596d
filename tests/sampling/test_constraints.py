"""Constrained text obeys, in every order, and is drawn from what the rule leaves.

Checked by routes that know nothing of the automaton that writes: Python's `re` and `json`, a
validator of a few lines, and enumeration. Distributions are compared by chi-square, rejecting under
p = 1e-4.
"""

import itertools
import json
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import blockdiff
from blockdiff import Engine, SamplingOptions, cli
from blockdiff.categorical import warp
from blockdiff.conversation import Conversation
from blockdiff.data.chat_templates import PLAIN, ChatTemplate
from blockdiff.errors import InputError
from blockdiff.sampling.constraints import allowed_along, constrain
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from helpers import tiny_model
from sampling.test_orders_whole import GIVEN, model_of

pytest.importorskip("llguidance")
ORDERS = {**GIVEN, "first hitting": {}, "ancestral": {"sampler": "ancestral", "steps": 2}}


class Zigzag:
    """Token ids that rise and fall in turn, begin below 4, and end with a 0: no library."""

    EOS = None

    def __init__(self, tokens=()):
        self.tokens = list(tokens)

    def begin(self):
        return type(self)()

    def copy(self):
        return type(self)(self.tokens)

    @staticmethod
    def obeys(tokens):
        """The definition; beginnings of such texts obey, too."""
        rising = [b > a for a, b in itertools.pairwise(tokens)]
        turns = all(up == (i % 2 == 0) for i, up in enumerate(rising))
        flat = any(a == b for a, b in itertools.pairwise(tokens))
        ended = any(token == 0 for token in tokens[:-1])
        return bool(turns and not flat and not ended and all(t < 4 for t in tokens[:1]))

    @property
    def finished(self):
        return bool(self.tokens) and self.tokens[-1] == 0

    accepting = finished

    def allowed(self):
        return np.array([self.obeys([*self.tokens, token]) and token != 8 for token in range(9)])

    def advance(self, token):
        if not self.allowed()[token]:
            raise InputError(f"no {token} here")
        self.tokens.append(token)


@pytest.mark.parametrize("given", ORDERS.values(), ids=list(ORDERS))
@pytest.mark.parametrize("kind", ["block", "mdlm", "causal shift"])
def test_every_order_obeys_and_rows_beside_are_unchanged(kind, given):
    """Alone, in a batch, beside rows without a constraint, streamed: the same tokens."""
    model, _, _ = model_of(kind)
    prompts = [[1, 2, 3], [7, 7], [5], [1, 1, 1, 1, 6], [2, 4]]
    new = 9
    free = SamplingOptions(max_new_tokens=new, stop="none", seed=3, **given)
    bound = SamplingOptions(max_new_tokens=new, stop="none", seed=3, constraint=Zigzag(), **given)
    engine = Engine(model.eval())
    names = [engine.admit(p, (bound, free)[i % 2], i) for i, p in enumerate(prompts)]
    while engine.active:
        step = engine.step()
        for row in range(0, len(names), 2):  # at each step a beginning that obeys
            text = step.tokens[row, len(prompts[row]) :].tolist()
            known = text[: next((i for i, t in enumerate(text) if t == 8), new)]
            assert Zigzag.obeys(known[: int(step.lengths[row]) - len(prompts[row]) or None]
                                if step.lengths[row] >= 0 else known[:new])  # fmt: skip
    for row, prompt in enumerate(prompts):
        options = (bound, free)[row % 2]
        done = generate_tokens(model, [prompt], options, [row])
        found = step.tokens[row, len(prompt) : step.lengths[row]].tolist()
        assert found == done.tokens[0]
        assert done.nfe[0] == step.nfe[row]
        if options is bound:
            assert Zigzag.obeys(found)
            ended = found[-1] == 0
            assert done.finish == ["stop" if ended else "length"]
            assert ended or len(found) == new
            assert bool(step.stopped[row]) == ended


def test_a_text_that_ends_with_the_last_token_it_may_have_is_whole():
    model, _, _ = model_of("block")
    finish = Counter()
    for new in (1, 2, 3):
        options = SamplingOptions(max_new_tokens=new, stop="none", constraint=Zigzag())
        done = generate_tokens(model, [[1]] * 40, options)
        for tokens, end in zip(done.tokens, done.finish, strict=True):
            assert end == ("stop" if tokens[-1] == 0 else "length")
            finish[end, len(tokens) == new] += 1
    assert finish["stop", True] and finish["length", True] and finish["stop", False]


def test_sedd_obeys_too():
    model = tiny_model(vocab_size=9, block_size=12, score=True, time_conditioning=True)
    for given in ({"sampler": "analytic", "steps": 4}, {}):
        options = SamplingOptions(max_new_tokens=8, stop="none", constraint=Zigzag(), **given)
        done = generate_tokens(model, [[1], [2, 3]], options)
        assert all(map(Zigzag.obeys, done.tokens))


def test_an_order_that_breaks_a_constraint_is_told():
    model, _, _ = model_of("block")

    class Wrong(blockdiff.Order):
        name = "wrong"

        def choose(self, logits, wanted, rows):
            return None, torch.full((len(logits),), 7)

    options = SamplingOptions(sampler=Wrong(), constraint=Zigzag(), max_new_tokens=3)
    with pytest.raises(InputError, match="no 7 here"):
        generate_tokens(model, [[1]], options)
    never = SamplingOptions(
        constraint=Zigzag(), max_new_tokens=3, logit_bias=dict.fromkeys(range(4), -math.inf)
    )
    with pytest.raises(InputError, match="leave no token"):
        generate_tokens(model, [[1]], never)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("ar", {}),
        ("ar", {"sampler": "verified", "drafter": "table", "drafts": 3}),
        ("causal", {"sampler": "verified", "drafts": 3}),
        ("causal", {"block_size": 1}),
        ("causal", {"sampler": "verified", "drafts": 2, "temperature": 0.7, "top_k": 2}),
    ],
)
def test_texts_are_drawn_from_what_the_rule_leaves(kind, given):
    """At L' = 1 by the product of masked and renormalised conditionals, enumerated."""
    settings = {"causal": True} if kind == "ar" else {
        "block_size": 4, "clean_stream": "causal", "block_sizes": (1, 4)}  # fmt: skip
    model = tiny_model(vocab_size=6, length=12, seed=5, **settings).eval()

    class Rule(Zigzag):
        def allowed(self):
            return super().allowed()[:6] & (np.arange(6) != 5)

    cut = {name: given[name] for name in ("temperature", "top_k") if name in given}
    law, prompt, new = {}, [2, 3], 4

    def grow(text, probability):
        automaton = Rule(text)
        if automaton.finished or len(text) == new:
            law[tuple(text)] = probability
            return
        whole = torch.tensor([[*prompt, *text]])
        with torch.no_grad():
            if kind == "ar":
                logits = model(whole).logits[0, -1]
            else:
                x = torch.cat([whole, torch.tensor([[5]])], 1)
                layout = model.config.layout_of(x.shape[1], 1)
                logits = model(x, x_0=x, layout=layout, backend="dense").logits[0, -1]
        logits = logits.float().masked_fill(~torch.from_numpy(automaton.allowed()), -math.inf)
        for token, p in enumerate(warp(logits[None], **cut)[0].double().softmax(-1).tolist()):
            if p > 0:
                grow([*text, token], probability * p)

    grow([], 1.0)
    assert math.isclose(sum(law.values()), 1) and len(law) > 5
    rows = 2000
    options = SamplingOptions(max_new_tokens=new, stop="none", constraint=Rule(), seed=1, **given)
    done = generate_tokens(model, [prompt] * rows, options)
    counts = Counter(map(tuple, done.tokens))
    assert set(counts) <= set(law)
    often = [text for text in law if law[text] * rows >= 5]
    seen = [counts[text] for text in often] + [rows - sum(counts[text] for text in often)]
    expected = [law[text] * rows for text in often]
    expected.append(rows - sum(expected))
    if expected[-1] < 1e-6:
        seen, expected = seen[:-1], expected[:-1]
    assert stats.chisquare(seen, np.array(expected) * sum(seen) / sum(expected)).pvalue > 1e-4


def test_what_may_follow_drafts():
    automaton = Zigzag([2])
    allowed = allowed_along(automaton, [5, 1, 4])
    assert allowed.shape == (4, 9) and automaton.tokens == [2]
    for i in range(4):
        assert allowed[i].tolist() == Zigzag([2, 5, 1, 4][: i + 1]).allowed().tolist()
    refused = allowed_along(automaton, [5, 6, 4])  # falls after a rise: 6 is not allowed
    assert (refused[2:] == refused[1]).all() and not refused[1][6]
    ended = allowed_along(automaton, [5, 0, 4])
    assert (ended[2:] == ended[1]).all() and ended[1][0]


# the library


@pytest.fixture(scope="module")
def starter():
    return blockdiff.load("starter", device="cpu")


REGEXES = [
    "[0-9]{4}", "(yes|no|perhaps)", " [A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})*\\.", "a*b", "é+ü?",
    "\\d{1,3}(\\.\\d{1,3}){3}", "[^a-z]{3,6}x", "(?:ab|cd){2,3}", "\\w+@\\w+\\.(com|org)",
    "\\$\\d+\\.\\d\\d", "^(north|south) \\d+$", "(?i)ab[xy]", "\\s\\S\\s", "日本(語)?.{1,4}!",
    "[\\]\\-a]{2}\\\\",
]  # fmt: skip
SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8},
     "age": {"type": "integer", "minimum": 0, "maximum": 150}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"enum": ["red", 3, None, {"a": [1, 2]}]},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[ab]{2,4}$"}]},
    {"type": "object", "properties": {"x": {"type": "array", "items": {"enum": [1, 2]},
     "minItems": 2, "maxItems": 2}}, "required": ["x"], "additionalProperties": False},
    {"const": "two words"},
]  # fmt: skip


def valid(value, schema):
    """JSON schema for the words that the schemas here use."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"] and not (isinstance(value, bool) and True not in schema)
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    if kind == "integer":
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if not isinstance(value, types[kind]):
        return False
    if kind == "object":
        known = schema["properties"]
        named = set(schema["required"]) <= set(value) <= set(known)
        return named and all(valid(inner, known[name]) for name, inner in value.items())
    if kind == "array":
        size = schema["minItems"] <= len(value) <= schema["maxItems"]
        return size and all(valid(inner, schema["items"]) for inner in value)
    if kind == "string":
        pattern = re.search(schema.get("pattern", ""), value)
        return pattern is not None and len(value) <= schema.get("maxLength", math.inf)
    return True


SAMPLERS = [{}, {"sampler": "ancestral", "steps": 2}, {"threshold": 0.3}, {"entropy_bound": 1.0},
            {"sampler": "editing", "edit_threshold": 0.5}]  # fmt: skip


def test_regular_expressions_of_the_library(starter):
    model, tokenizer = starter
    finished = 0
    for number, (regex, given) in enumerate(zip(REGEXES, itertools.cycle(SAMPLERS), strict=False)):
        done = blockdiff.generate(
            model, "In the year", tokenizer=tokenizer, regex=regex, seed=number, samples=2,
            max_new_tokens=48, **given,
        )  # fmt: skip
        for text, end in zip(done.texts, done.finish, strict=True):
            flags = 0 if "(?i)" in regex else re.ASCII
            assert end == "length" or re.fullmatch(regex, text, flags), (regex, text, end)
            finished += end != "length"
    assert finished > len(REGEXES)


def test_schemas_of_the_library(starter, tmp_path):
    model, tokenizer = starter
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMAS[0]))
    given = [*SCHEMAS, json.dumps(SCHEMAS[1]), str(tmp_path / "schema.json")]
    for number, (schema, own) in enumerate(zip(given, itertools.cycle(SAMPLERS), strict=False)):
        done = blockdiff.generate(
            model, "It is", tokenizer=tokenizer, json_schema=schema, seed=number, samples=2,
            max_new_tokens=64, **own,
        )  # fmt: skip
        rule = SCHEMAS[1] if number == 6 else SCHEMAS[0] if number == 7 else schema
        for text, end in zip(done.texts, done.finish, strict=True):
            assert end in ("stop", "eos"), text
            value = json.loads(text)
            assert valid(value, rule)
            assert text == json.dumps(value, separators=(",", ":"), ensure_ascii=False) or (
                "\\" in text
            ), "no free white space"


def test_what_the_limit_cuts_off_is_a_beginning(starter):
    model, tokenizer = starter
    done = blockdiff.generate(
        model, "The", tokenizer=tokenizer, regex="(?:[a-f]{5}-)+!", max_new_tokens=6, samples=4
    )
    assert done.finish == ["length"] * 4
    assert all(re.fullmatch("(?:[a-f]{5}-)*[a-f]{0,5}", text) for text in done.texts)


def test_the_end_is_free_to_come_where_the_text_may_end(starter):
    """Of texts that can go on, the model ends some; without a token for it none."""
    model, tokenizer = starter
    bias = {tokenizer.eos_token_id: 12.0}
    wish = {"tokenizer": tokenizer, "regex": "a+", "max_new_tokens": 8, "samples": 6}
    done = blockdiff.generate(model, "The", logit_bias=bias, **wish)
    assert "eos" in done.finish and all(re.fullmatch("a+", text) for text in done.texts)
    lone = constrain(tokenizer, regex="a+", eos_token_id=())
    options = SamplingOptions(constraint=lone, max_new_tokens=8, logit_bias=bias)
    done = blockdiff.generate(model, "The", tokenizer=tokenizer, samples=6, options=options)
    assert set(done.finish) == {"length"}
    four = constrain(tokenizer, regex="[0-9]{4}", eos_token_id=())
    options = SamplingOptions(constraint=four, max_new_tokens=8)
    assert blockdiff.generate(model, "The", tokenizer=tokenizer, options=options).finish == ["stop"]


def test_ids_without_a_token_and_the_mask_are_never_allowed(starter):
    model, tokenizer = starter
    rule = constrain(tokenizer, regex="(?s).*", vocab_size=2060, banned=[1500]).begin().allowed()
    assert len(rule) == 2060 and not rule[2048:].any() and not rule[model.config.mask_token_id]
    assert not rule[1500] and rule[tokenizer.eos_token_id] and rule.sum() > 1900


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a)\\1"}, "backreferences are not supported"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a\\b"}, "lookarounds not supported"),
        ({"regex": "[^\\s\\S]"}, "allows nothing"),
        ({"regex": ""}, "allows only the empty text"),
        ({"regex": "[a-z&&[0-9]]"}, "is ambiguous: Possible set intersection"),
        ({"regex": "a++b"}, "is ambiguous: possessive"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable"),
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "does not exist"),
        ({"json_schema": {"type": "flag"}}, "Invalid type"),
        ({"json_schema": "{"}, "no JSON"),
        ({"json_schema": "nowhere.json"}, "neither a JSON object nor a file"),
        ({"json_schema": [1]}, "must be a schema"),
        ({"choices": []}, "`choices` is empty"),
        ({"choices": ["a", ""]}, "`choices` holds an empty text"),
        ({"regex": "a", "json_schema": {}}, "exclude each other"),
        ({"regex": "a", "tokenizer": None}, "`regex` needs the model's tokenizer"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_evaluation(starter, wish, words, monkeypatch):
    model, tokenizer = starter
    monkeypatch.setattr(Engine, "step", lambda engine: pytest.fail("evaluated"))
    with pytest.raises(InputError, match=re.escape(words)) as error:
        blockdiff.generate(model, [[1]], **{"tokenizer": tokenizer, **wish})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def spelled(kind):
    words = ["hello world yes no 0123456789 the quick brown fox jumps"] * 20
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])  # fmt: skip
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        first = ["<unk>", "</s>"]
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=first,
            initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz"),
        )  # fmt: skip
        tokenizer.train_from_iterator(words, trainer)
        whole = json.loads(tokenizer.to_str())
        size = len(whole["model"]["vocab"])
        for byte in range(256):
            whole["model"]["vocab"][f"<0x{byte:02X}>"] = size + byte
        tokenizer = Tokenizer.from_str(json.dumps(whole))
    elif kind == "few bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(words, trainers.BpeTrainer(special_tokens=["</s>"]))
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.train_from_iterator(
            words, trainers.WordPieceTrainer(special_tokens=["[UNK]", "</s>"], vocab_size=90)
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_which_tokenizers_there_are():
    """SentencePiece with bytes reads as what it decodes to; others are refused with the reason."""
    tokenizer = spelled("bytes")
    model = tiny_model(vocab_size=len(tokenizer) + 1, eos_token_id=1, length=32)
    done = blockdiff.generate(
        model, "hello", tokenizer=tokenizer, regex=" (yes|no) ü[0-9]{2}", samples=4,
        max_new_tokens=20,
    )  # fmt: skip
    assert done.finish == ["stop"] * 4
    assert all(re.fullmatch(" (yes|no) ü[0-9]{2}", text) for text in done.texts)
    with pytest.raises(InputError, match="this kind of tokenizer"):
        constrain(spelled("wordpiece"), regex="a")
    with pytest.raises(InputError, match="no token for the byte 0x"):
        constrain(spelled("few bytes"), regex="a")


def test_without_the_library_one_line_says_what_to_install(starter, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'blockdiff\[constrain\]'"):
        constrain(starter[1], regex="a")


def test_the_command_line(capsys, tmp_path):
    def run(*words):
        try:
            cli.main(["generate", "starter", "It is", "--max-new-tokens", "24", *words])
        except SystemExit as stop:
            return stop.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, out = run("--choices", " yes", "--choices", " no", "--json", "--samples", "2")
    shown = json.loads(out.out)
    assert code == 0 and shown["finish"] == ["stop"] * 2 and set(shown["texts"]) <= {" yes", " no"}
    assert shown["options"]["choices"] == [" yes", " no"]
    (tmp_path / "schema.json").write_text('{"enum": [12, 345]}')
    code, out = run("--json-schema", str(tmp_path / "schema.json"), "--json")
    assert code == 0 and json.loads(out.out)["texts"][0] in ("12", "345")
    code, out = run("--regex", "[0-9]{3}", "--threshold", "0.2", "--json", "--cfg-scale", "0.5")
    assert code == 0 and re.fullmatch("[0-9]{3}", json.loads(out.out)["texts"][0])
    code, out = run("--stop-strings", "e", "--stop-strings", "a", "--logit-bias", "7=-inf",
                    "--logit-bias", "9=1.5", "--repetition-penalty", "1.2", "--json")  # fmt: skip
    shown = json.loads(out.out)
    assert code == 0 and shown["finish"] == ["stop"] and shown["options"]["logit_bias"]["9"] == 1.5
    for words, line in (
        (["--regex", "(a"], "error: --regex: the regular expression is refused: unclosed group"),
        (["--regex", "a", "--choices", "b"], "--regex and --choices exclude each other"),
        (["--logit-bias", "a"], "--logit-bias 'a' is no id with a number"),
        (["--logits-processor", "a"], "unknown option --logits-processor"),
    ):
        code, out = run(*words)
        assert code == 2 and line in out.err and out.err.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--regex", "--json-schema", "--choices", "--cfg-scale"))
    assert "--constraint" not in text


def test_a_conversation_and_streams_are_bound_too(starter):
    model, tokenizer = starter
    options = SamplingOptions(regex="(Yes|No)", max_new_tokens=20)
    talk = Conversation(model, tokenizer, ChatTemplate(tokenizer, PLAIN), options)
    reply = talk.ask("Is it so?")
    list(reply)
    answer = talk.keep(reply)
    assert answer.content in ("Yes", "No") and answer.finish == "stop"
    *_, last = blockdiff.stream(model, "It", tokenizer=tokenizer, regex="[0-9]{2}")
    new = last.tokens[0, 1 + len(tokenizer.encode("It")) : last.lengths[0]].tolist()
    assert re.fullmatch("[0-9]{2}", tokenizer.decode(new))
    ids = torch.tensor([tokenizer.encode("It")])
    found = model.generate(ids, regex="[0-9]{2}", tokenizer=tokenizer, max_new_tokens=9)
    assert re.fullmatch("[0-9]{2}", tokenizer.decode(found[0, ids.shape[1] :]))
    with pytest.raises(InputError, match="leave `regex` out"):
        blockdiff.infill(model, "It [[gap:2]] so", tokenizer=tokenizer, regex="a")
    assert list(stream_tokens(model, [[1]], SamplingOptions(max_new_tokens=1)))
