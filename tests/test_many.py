"""Many prompts, many pairs: a record depends on its line alone; no kill loses or doubles one."""

import json
import os
import random
import signal
import time
from itertools import pairwise

import pytest

import blockdiff
import processes
from blockdiff import cli
from blockdiff.data.lines import seed_of
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.models.hub import save_model
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.many import Wanted, write_rows
from blockdiff.sampling.options import SamplingOptions
from helpers import tiny_model

TEXT = "The law of the land is the law, naïve ☕ 日本語. "
PROMPTS = ["The law", "land is", "", "of the land", "naïve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT] * 20, 300)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    save_model(tiny_model(vocab_size=len(tokenizer), length=16, **ends), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    return blockdiff.load(folder)


def lines_file(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def generate(folder, prompts, out, *more):
    words = ["generate", folder, "--prompt-file", prompts, "--out", out, "--max-new-tokens", 9]
    cli.main([str(word) for word in [*words, *more]])
    return [json.loads(line) for line in out.read_text().splitlines()]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    *before, error = capsys.readouterr().err.splitlines()
    assert (
        stop.value.code == 2 and not any("error" in line for line in before) and "`" not in error
    ), error
    return error


# the engine


def rows_wanted(count, model):
    draw = random.Random(5)
    for _ in range(count):
        prompt = [draw.randrange(model.config.mask_token_id) for _ in range(draw.randint(1, 11))]
        options = SamplingOptions(
            max_new_tokens=draw.choice([1, 3, 17, 40]), seed=draw.randrange(9), stop="none",
            **draw.choice([{}, {"threshold": 0.2}, {"margin": 0.2}, {"temperature": 0.5}]),
        )  # fmt: skip
        yield Wanted(prompt, options, draw.randrange(3))


@pytest.mark.parametrize("at_once", [1, 5])
def test_rows_come_in_order_and_are_what_they_are_alone(opened, at_once):
    model, _ = opened
    wanted = list(rows_wanted(24, model))
    taken = []

    def read():
        for row in wanted:
            taken.append(row)
            yield row

    fixed = []
    made = []
    for done in write_rows(model, read(), at_once, lambda *seen: fixed.append(seen)):
        made.append(done)
        assert len(taken) <= len(made) + 8 * at_once, "read only as there is room"
    assert len(made) == 24 and max(rows for _, rows in fixed) == at_once
    for row, done in zip(wanted, made, strict=True):
        alone = generate_tokens(model, [row.prompt], row.options, [row.number])
        assert (done.tokens, done.nfe, done.finish) == (alone.tokens, alone.nfe, alone.finish)
    assert sum(count for count, _ in fixed) >= sum(len(one.tokens[0]) for one in made)
    assert list(write_rows(model, iter(()), 3)) == []


# seeds


def test_no_two_numbers_below_2_to_the_32_share_a_seed():
    """The finaliser is one-to-one: each of its steps can be taken back."""
    seeds = {seed_of(0, number) for number in range(200_000)}
    assert len(seeds) == 200_000 and all(0 <= one < 2**32 for one in seeds)
    spread = sorted(seed_of(1, number) for number in range(2000))
    gaps = [b - a for a, b in pairwise(spread)]
    assert max(gaps) < 30 * 2**32 / 2000, "everywhere"
    assert (
        len({seed_of(s, 7) for s in range(1000)} | {seed_of(0, f"{i}") for i in range(99)}) > 1095
    )
    assert not {seed_of(0, i) for i in range(500)} & {seed_of(1, i) for i in range(500)}
    assert seed_of(0, "7") != seed_of(0, 7)


# texts


def test_a_line_has_the_text_of_its_prompt_and_seed_alone(folder, tmp_path, opened):
    rows = [{"prompt": text} for text in PROMPTS]
    rows += [{"id": "é", "prompt": "The", "seed": 5, "max_new_tokens": 4},
             {"id": 9, "prompt": "The", "threshold": 0.3, "top_p": 0.7}]  # fmt: skip
    made = generate(folder, lines_file(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl",
                    "--seed", 3, "--samples", 2)  # fmt: skip
    assert [(one["id"], one["sample"]) for one in made] == [
        (key, sample) for key in [1, 2, 3, 4, 5, "é", 9] for sample in (0, 1)
    ]
    model, tokenizer = opened
    for one, row in zip(made[::2], rows, strict=True):
        own = {k: v for k, v in row.items() if k not in ("id", "prompt")}
        options = {"max_new_tokens": 9, **own, "seed": one["seed"]}
        alone = blockdiff.generate(
            model, row["prompt"], tokenizer=tokenizer, samples=2, options=options
        )
        two = [made[made.index(one)], made[made.index(one) + 1]]
        assert [x["text"] for x in two] == alone.texts
        assert [(x["tokens"], x["nfe"], x["finish_reason"]) for x in two] == [
            *zip(map(len, alone.tokens), alone.nfe, alone.finish, strict=True)
        ]
    assert made[10]["seed"] == 5 and made[0]["seed"] == seed_of(3, 1)
    assert len({one["seed"] for one in made}) == len(rows)


def test_neither_company_nor_order_changes_a_line(folder, tmp_path):
    rows = [{"id": f"r{i}", "prompt": PROMPTS[i % 5], "max_new_tokens": 1 + i % 7 * 3}
            for i in range(24)]  # fmt: skip
    plain = generate(folder, lines_file(tmp_path / "a.jsonl", rows), tmp_path / "a.out")
    random.Random(2).shuffle(rows)
    mixed = lines_file(tmp_path / "b.jsonl", rows)
    for size in (1, 5):
        made = generate(folder, mixed, tmp_path / f"{size}.out", "--batch-size", size)
        assert [one["id"] for one in made] == [row["id"] for row in rows]
        assert {one["id"]: one for one in made} == {one["id"]: one for one in plain}


def test_plain_text_is_a_prompt_a_line(folder, tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffThe law\r\n\n  \nnaïve".encode())
    made = generate(folder, path, tmp_path / "o.jsonl", "--logprobs")
    rows = [{"id": 1, "prompt": "The law"}, {"id": 4, "prompt": "naïve"}]
    same = generate(folder, lines_file(tmp_path / "p.jsonl", rows), tmp_path / "o2.jsonl",
                    "--logprobs")  # fmt: skip
    assert made == same and len(made) == 2
    assert all(len(one["logprobs"]) == one["tokens"] for one in made)


def test_messages_are_answered_as_in_a_chat(folder, tmp_path, opened):
    rows = [{"messages": [{"role": "user", "content": "<|mask|>"}]},
            {"messages": [{"role": "system", "content": "law"}, {"role": "user", "content": "Hi"}],
             "max_new_tokens": 5}]  # fmt: skip
    made = generate(folder, lines_file(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl")
    assert len(made) == 2 and all("User:" not in one["text"] for one in made)


def test_it_goes_on_and_refuses_other_options(folder, tmp_path, capsys):
    prompts = lines_file(tmp_path / "p.jsonl", [{"prompt": text} for text in PROMPTS * 3])
    out = tmp_path / "o.jsonl"
    generate(folder, prompts, out)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) * 2 // 3])
    generate(folder, prompts, out, "--batch-size", 2)
    assert out.read_bytes() == whole
    assert "15 lines, 9 of them from before" in capsys.readouterr().err
    words = ["generate", folder, "--prompt-file", prompts, "--out", out, "--max-new-tokens"]
    assert "begun with max_new_tokens 9, not 8" in refused(capsys, *words, 8)
    said = refused(capsys, *words, 9, "--precision", "bf16")
    assert 'precision "float32", not "bf16"' in said and "--overwrite" in said
    lines_file(prompts, [{"prompt": "land"}])
    assert "begun with file" in refused(capsys, *words, 9)
    assert out.read_bytes() == whole
    made = generate(folder, prompts, out, "--overwrite")
    assert len(made) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "a", "id": 1}', "line 2: the id 1 is that of line 1"),
        ('{"prompt": "a", "id": 1.5}', "line 2: the id is 1.5"),
        ('{"prompt": "a", "id": true}', "line 2: the id is True"),
        ('{"prompt": 3}', "line 2: 'prompt' must be text"),
        ('{"text": "a"}', "line 2: a line needs either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "line 2: a line needs either"),
        ('{"messages": []}', "no messages"),
        (
            '{"messages": [{"role": "me", "content": ""}]}',
            "line 2: the chat: message 1 has the role",
        ),
        ('{"prompt": "a", "max_tokens": 3}', "line 2: 'max_tokens' is no sampling option"),
        ('{"prompt": "a", "temperature": -1}', "line 2: --temperature is -1"),
        ('{"prompt": "a", "seed": -1}', "line 2: --seed is -1"),
        ('{"prompt": "a<|mask|>"}', "line 2: the prompt contains the mask token"),
        ('{"prompt": "a", "threshold": 0.5, "margin": 0.1}', "line 2: no sampler reads"),
        ('{"prompt": "\\ud800"}', "line 2: half a surrogate pair"),
        ("[1]", "line 2: a JSON object is needed"),
        ("{", "line 2: not JSON"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_before_any_work(folder, tmp_path, capsys, row, said):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + row + "\n")
    words = ["generate", folder, "--prompt-file", path, "--out", tmp_path / "o.jsonl"]
    assert said in refused(capsys, *words)
    assert [one.name for one in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "o"], "give a --prompt-file"),
        (["--prompt-file", "p", "--overwrite"], "give --out as well"),
        (["--prompt-file", "p", "--out", "o", "--json"], "--json and --out exclude each other"),
        (["--prompt-file", "-", "--out", "o"], "--prompt-file is -"),
        (["--prompt-file", "gone", "--out", "o"], "cannot read gone"),
    ],
)
def test_what_does_not_go_with_a_file_of_texts(folder, words, said, capsys):
    assert said in refused(capsys, "generate", folder, *words)


# kills


def test_killed_jobs_are_resumed_to_the_same_file(folder, tmp_path):
    """A sample of benchmarks/batch_kills.py: two kills, anywhere."""
    rows = [{"prompt": text, "max_new_tokens": 1 + i % 37} for i, text in enumerate(PROMPTS * 36)]
    prompts = lines_file(tmp_path / "p.jsonl", rows)
    generate(folder, prompts, tmp_path / "whole.jsonl")
    out = tmp_path / "o.jsonl"
    words = ["generate", folder, "--prompt-file", prompts, "--out", out, "--max-new-tokens", 9]
    sizes = [0]
    for _ in range(2):
        process = processes.started(tmp_path / "streams", [str(word) for word in words])
        end = time.monotonic() + 60
        while process.is_alive() and (not out.exists() or out.stat().st_size < sizes[-1] + 400):
            assert time.monotonic() < end
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        sizes.append(out.stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2] < (tmp_path / "whole.jsonl").stat().st_size
    generate(folder, prompts, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# pairs


def test_scores_go_on_where_they_stopped(folder, tmp_path, capsys):
    pairs = lines_file(
        tmp_path / "pairs",  # JSON lines whatever the name
        [{"context": text, "continuation": " is the law"[: 4 + i % 7], "note": [i], "id": f"n{i}"}
         for i, text in enumerate(PROMPTS * 4)],
    )  # fmt: skip
    cli.main(["score", str(folder), "--file", str(pairs), "--json"])
    plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    out = tmp_path / "o.jsonl"
    words = ["score", str(folder), "--file", str(pairs), "--out", str(out), "--batch-size"]
    cli.main([*words, "6"])
    whole = out.read_bytes()
    for one, other in zip(map(json.loads, whole.splitlines()), plain, strict=True):
        assert one.pop("nats") == pytest.approx(other.pop("nats"), rel=1e-4)
        assert one == other
    for lines in (4, 6, 17):
        out.write_bytes(b"".join(whole.splitlines(True)[:lines]) + b'{"half')
        cli.main([*words, "3"])  # what a job began with it keeps to
        assert out.read_bytes() == whole, "its last digits too"
    assert "begun with seed 0, not 1" in refused(capsys, *words, "6", "--seed", "1")
    assert "exclude each other" in refused(capsys, *words, "6", "--json")
    assert "give --out as well" in refused(capsys, *words[:4], "--overwrite")
    lines_file(pairs, [{"context": "a", "continuation": "b"}, {"context": "a", "continuation": ""}])
    assert "line 2: the continuation of pair 2 is empty" in refused(
        capsys, *words, "6", "--overwrite"
    )


# a corpus


def figures(capsys):
    record = json.loads(capsys.readouterr().out)
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


def test_a_measurement_goes_on_where_it_stopped(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 40)
    words = ["evaluate", str(folder), str(tmp_path / "text.txt"), "--json", "--draws", "2",
             "--estimator", "exact_k", "--batch-size"]  # fmt: skip
    cli.main([*words, "7"])
    plain = figures(capsys)
    out = tmp_path / "o.jsonl"
    cli.main([*words, "7", "--out", str(out)])
    assert figures(capsys) == pytest.approx(plain, rel=1e-9)
    whole = out.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [one["id"] for one in lines] == list(range(plain["sequences"])) and len(lines) > 20
    assert sum(one["tokens"] for one in lines) == plain["counted_tokens"]
    for count in (0, 9, 14, len(lines)):
        out.write_bytes(b"".join(whole.splitlines(True)[:count]))
        cli.main([*words, "7" if not count else "4", "--out", str(out)])
        assert figures(capsys) == pytest.approx(plain, rel=1e-9)
        assert out.read_bytes() == whole
    assert "begun with length 16, not 8" in refused(
        capsys, *words, "7", "--out", str(out), "--length", "8"
    )
    assert "give --out as well" in refused(capsys, *words, "7", "--overwrite")
