"""Scores and texts through lm-evaluation-harness's own evaluator, against the obvious loops."""

import json
import math
import os
import pickle
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import blockdiff
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.harness_options import generation_options, read_arguments
from blockdiff.models.hub import save_model
from blockdiff.sampling.options import SamplingOptions
from helpers import tiny_model

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.loggers import EvaluationTracker  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import lm_eval_blockdiff  # noqa: E402
from blockdiff.evaluation.harness import BlockDiffusionLM, LogLikelihood  # noqa: E402

ROOT = Path(__file__).parents[1]
PASSAGES = [
    f"the {a} {b} walks over it and then it sees the {a} {b} by the {c}"
    for a in ("old", "red") for b in ("dog", "cat") for c in ("hill", "road", "wall", "lake", "sky")
]  # fmt: skip
CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer():
    """Of the passages without their last words, which are thus several tokens each."""
    return train_tokenizer([text.rpartition(" ")[0] for text in PASSAGES], 280)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """AR, L' = 4, L' = 8 and SEDD, all weights drawn at random."""
    home, size = tmp_path_factory.mktemp("models"), len(tokenizer)
    settings = {"vocab_size": size, "length": CONTEXT, "mask_token_id": tokenizer.mask_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id}  # fmt: skip
    for name, more in (
        ("ar", {"objective": "ar", "causal": True, "block_size": 1}),
        ("four", {"block_size": 4}),
        ("eight", {"block_size": 8}),
        (
            "sedd",
            {"objective": "sedd", "block_size": CONTEXT, "score": True, "time_conditioning": True},
        ),
    ):
        save_model(tiny_model(**settings, **more), home / name, tokenizer)
    return home


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The recipes' tasks, on passages of our own."""
    file = tmp_path_factory.mktemp("data") / "passages.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    os.environ["LAMBADA"] = str(file)
    yield TaskManager(include_path=str(ROOT / "recipes" / "lm_eval"), include_defaults=False)
    del os.environ["LAMBADA"]


def run(folder, tasks, names, limit=None, **settings):
    return lm_eval.simple_evaluate(
        model="blockdiff", model_args={"pretrained": str(folder), "device": "cpu", **settings},
        tasks=names, task_manager=tasks, bootstrap_iters=0, limit=limit,
    )  # fmt: skip


def answers(results, name):
    """Log-likelihoods and their errors, by passage and choice."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [[response[0][0] for response in sample["resps"]] for sample in samples]


def test_ar_is_a_loop_over_log_softmax(folders, tasks, tokenizer):
    found = run(folders / "ar", tasks, ["lambada_local", "lambada_choice"])
    model, _ = blockdiff.load(folders / "ar", device="cpu")

    @torch.no_grad()
    def by_hand(context, word):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(f"{context} {word}")]
        start = 1 + len(tokenizer.encode(context))
        log_p = model(torch.tensor([ids])).logits[0].double()
        log_p[:, tokenizer.mask_token_id] = -math.inf
        log_p = log_p.log_softmax(-1)
        total = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
        same = all(log_p[i - 1].argmax() == ids[i] for i in range(start, len(ids)))
        return total, same

    docs = [sample["doc"] for sample in found["samples"]["lambada_choice"]]
    assert len(docs) == len(PASSAGES)
    right = 0
    for doc, own in zip(docs, answers(found, "lambada_choice"), strict=True):
        assert len(set(doc["choices"])) == 4 and doc["choices"][doc["answer"]] == doc["word"]
        expected = [by_hand(doc["context"], word)[0] for word in doc["choices"]]
        assert own == pytest.approx(expected, abs=1e-4)
        right += int(torch.tensor(expected).argmax()) == doc["answer"]
    assert found["results"]["lambada_choice"]["acc,none"] == pytest.approx(right / len(docs))
    words = [by_hand(doc["context"], doc["word"]) for doc in docs]
    figures = found["results"]["lambada_local"]
    mean = sum(value for value, _ in words) / len(words)
    assert figures["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert figures["acc,none"] == sum(same for _, same in words) / len(words)
    assert found["config"]["likelihood_stderr_max"] == 0
    assert found["config"]["likelihood_is"] == "exact"


@pytest.mark.parametrize(("name", "exact"), [("four", True), ("eight", False)])
def test_the_batch_size_moves_no_score(folders, tasks, name, exact):
    by_size = {
        size: answers(run(folders / name, tasks, ["lambada_choice"], 4, batch_size=size),
                      "lambada_choice")
        for size in (1, 3, "auto")
    }  # fmt: skip
    for size in (3, "auto"):
        for one, other in zip(by_size[1], by_size[size], strict=True):
            assert one == pytest.approx(other, abs=1e-5), size
    errors = [one.error for row in by_size[1] for one in row]
    assert all(error == 0 for error in errors) if exact else sum(errors) > len(errors) / 10


def test_drawn_masks_come_with_their_error_in_the_sample_log(folders, tasks, tmp_path):
    """exact_k of L' = 8 against all of its masks: within its errors, which the log holds."""
    drawn = run(folders / "eight", tasks, ["lambada_choice"], 8, draws=8)
    whole = run(folders / "eight", tasks, ["lambada_choice"], 8, estimator="enumerate")
    pairs = [
        pair
        for rows in zip(answers(drawn, "lambada_choice"), answers(whole, "lambada_choice"),
                        strict=True)
        for pair in zip(*rows, strict=True)
    ]  # fmt: skip
    apart = torch.tensor([(a - b) for a, b in pairs])
    errors = torch.tensor([a.error for a, _ in pairs])
    assert all(b.error == 0 for _, b in pairs)
    # Over 32 answers: the mean's own error is a sixth of one's.
    assert abs(apart.mean()) < 4.5 * errors.square().mean().sqrt() / math.sqrt(len(pairs))
    assert drawn["config"]["likelihood_stderr_max"] == pytest.approx(errors.max().item())

    own = answers(drawn, "lambada_choice")
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.date_id = "today"
    tracker.save_results_samples("lambada_choice", drawn["samples"]["lambada_choice"])
    (file,) = tmp_path.rglob("samples_*.jsonl")
    first = json.loads(file.read_text().splitlines()[0])
    logged = first["resps"][0][0][0]
    value, error = (float(part) for part in logged.split(" ± "))
    assert value == own[first["doc_id"]][0]
    assert error == pytest.approx(own[first["doc_id"]][0].error, 0.01)
    kept = pickle.loads(pickle.dumps(LogLikelihood(-1.0, 0.5)))  # as the harness's cache does
    assert (kept, kept.error) == (-1.0, 0.5)


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


@pytest.mark.parametrize("name", ["ar", "four"])
def test_rolling_counts_each_token_once(folders, tokenizer, name):
    """A text of the context's length is one window; a longer one is windows, summed by hand."""
    lm = BlockDiffusionLM(pretrained=str(folders / name), max_length=16, device="cpu")
    text = " ".join(PASSAGES[:3])
    ids = tokenizer.encode(text)
    assert len(ids) > 40
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    row, expected, done = [tokenizer.bos_token_id, *ids], 0.0, 1
    while done < len(row):
        end = min(done + 15, len(row))
        begin = max(end - 16, 0)
        behind = [tokenizer.mask_token_id] * (-(end - begin) % 4)
        counted = [done <= i < end for i in range(begin, end)] + [False] * len(behind)
        part = torch.tensor([row[begin:end] + behind])
        nats = blockdiff.likelihood(lm.model, part, maskable=torch.tensor([counted])).nats
        expected -= nats.item()
        done = end
    assert found == pytest.approx(expected, abs=1e-3)
    assert lm.loglikelihood_rolling([request("loglikelihood_rolling", "")]) == [0.0]
    short = tokenizer.decode(ids[:9])
    (whole,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", short)])
    ((same, _),) = lm.loglikelihood([request("loglikelihood", "", short)])
    assert whole == pytest.approx(same, abs=1e-5)


def test_rolling_of_a_network_that_knows_nothing(folders, tokenizer):
    """Uniform predictions: −log V for each token, once, however many windows."""
    lm = BlockDiffusionLM(pretrained=str(folders / "four"), max_length=16, device="cpu")
    with torch.no_grad():
        lm.model.output.linear.weight.zero_()
        lm.model.output.linear.bias.zero_()
    for count in (1, 15, 16, 17, 30, 31, 50):
        ids = tokenizer.encode(" ".join(PASSAGES))[:count]
        text = tokenizer.decode(ids)
        count = len(tokenizer.encode(text))
        (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
        assert found == pytest.approx(-count * math.log(len(tokenizer) - 1), rel=1e-5), count


def test_texts_end_where_the_task_says(folders, tokenizer):
    lm = BlockDiffusionLM(pretrained=str(folders / "four"), device="cpu", batch_size=2)
    prompts = [text[:20] for text in PASSAGES[:5]]
    wish = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.8}

    def ask(**changes):
        return lm.generate_until(
            [request("generate_until", prompt, wish | changes) for prompt in prompts]
        )

    greedy, free = ask(), ask(do_sample=True)
    lm.options = replace(lm.options, batch_size=5)
    assert greedy == ask() and free == ask(do_sample=True), "the batch moves no text"
    assert greedy != free and all(greedy)
    for i, text in enumerate(free):
        cut = text[len(text) // 2 : len(text) // 2 + 2]
        assert ask(do_sample=True, until=[cut, "\0"])[i] == text.partition(cut)[0]
    again = lm.generate_until(
        [request("generate_until", prompts[0], wish | {"do_sample": True})] * 2
    )
    assert again[0] == free[0] and again[1] != free[0], "several answers to one prompt"


def test_greedy_texts_of_ar_are_those_of_generate(folders, tokenizer):
    lm = BlockDiffusionLM(pretrained=str(folders / "ar"), device="cpu", batch_size=3)
    prompts = [text[: 10 + i] for i, text in enumerate(PASSAGES[:5])]
    texts = blockdiff.generate(
        lm.model, prompts, tokenizer=tokenizer, max_new_tokens=9, temperature=0.0
    ).texts
    wish = {"until": None, "max_gen_toks": 9}
    assert lm.generate_until([request("generate_until", p, wish) for p in prompts]) == texts


def test_a_model_that_cannot_outgrow_its_context_writes_within_it(folders):
    lm = BlockDiffusionLM(pretrained=str(folders / "sedd"), device="cpu")
    wish = {"max_gen_toks": 1000}
    texts = lm.generate_until([request("generate_until", p, wish) for p in ("the", PASSAGES[0])])
    assert all(texts)
    ((value, _),) = lm.loglikelihood([request("loglikelihood", "the old", " dog walks")])
    assert value < 0 < value.error


def test_what_is_longer_than_the_context_is_read_from_its_end(folders, caplog):
    lm = BlockDiffusionLM(pretrained=str(folders / "ar"), device="cpu", max_length=16)
    long, end = " ".join(PASSAGES[:6]), PASSAGES[5]
    requests = [request("loglikelihood", context, " hill") for context in (long, end)]
    (one, _), (other, _) = lm.loglikelihood(requests)
    assert one == pytest.approx(other, abs=1e-5)
    assert lm.get_model_info()["left_truncated"] == 2 and "from their end on" in caplog.text
    assert lm.loglikelihood([request("loglikelihood", "a", "")]) == [(0.0, True)]
    assert "trained with" not in caplog.text
    BlockDiffusionLM(pretrained=str(folders / "four"), device="cpu", block_size=2)
    assert "trained with L' = 4, not 2" in caplog.text
    with pytest.raises(InputError, match=r"continuation 1 has .* more than the 16"):
        lm.loglikelihood([request("loglikelihood", "the", " dog" * 20)])
    (text,) = lm.generate_until([request("generate_until", long, {"max_gen_toks": 40})])
    assert text


def test_conversations_go_by_the_tokenizers_template(folders, tokenizer):
    lm = BlockDiffusionLM(pretrained=str(folders / "ar"), device="cpu")
    talk = [{"role": "user", "content": "the old dog"}]
    with pytest.raises(InputError, match="no chat template"):
        lm.apply_chat_template(talk)
    bos = tokenizer.decode([tokenizer.bos_token_id])
    lm.tokenizer.chat_template = (
        bos + "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}{{ 1 / (messages | length - 2) and '' }}"
    )
    text = lm.apply_chat_template(talk)
    assert text == f"{bos}user: the old dog\nbot:" and lm.chat_template(True)
    ids, _ = lm._pair(text, " the")
    assert ids.count(tokenizer.bos_token_id) == 1
    lm.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="refuses this task"):
        lm.apply_chat_template(talk)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretraned": "x"}, "no model argument 'pretraned'"),
        ({}, "`pretrained` is missing"),
        ({"pretrained": "x", "seed": "abc"}, "`seed` is 'abc'"),
        ({"pretrained": "x", "draws": 0}, "`draws` is 0"),
        ({"pretrained": "x", "estimator": "clipped"}, "`estimator` 'clipped' is unknown"),
        ({"pretrained": "x", "batch_size": "many"}, "`batch_size` is 'many'"),
        ({"pretrained": "x", "max_length": 1}, "`max_length` is 1"),
        ({"pretrained": "x", "dtype": "float16"}, "`dtype` 'float16' is unknown"),
        ({"pretrained": "x", "dtype": "bfloat16", "precision": "int8"}, "different things"),
        ({"pretrained": "x", "top_p": 2}, "`top_p` is 2"),
        ({"pretrained": "x", "sampler": "best"}, "`sampler` 'best' is unknown"),
        ({"pretrained": "/nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(given, message):
    with pytest.raises(InputError, match=message) as refused:
        get_model("blockdiff").create_from_arg_obj(given, {"batch_size": None, "device": None})
    assert "\n" not in str(refused.value)


def test_lm_evals_own_command_says_it_in_one_line(monkeypatch, capsys):
    given = ({"pretrained": "x", "draws": 0}, {})
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: told.append(error))
    for program, lines in (("/usr/bin/my_script", 0), ("/usr/bin/lm-eval", 1)):
        monkeypatch.setattr(sys, "argv", [program])
        try:
            BlockDiffusionLM.create_from_arg_obj(*given)
        except InputError:
            sys.excepthook(*sys.exc_info())
        assert capsys.readouterr().err.count("\n") == lines and len(told) == 1
    sys.excepthook(KeyError, KeyError(), None)
    assert len(told) == 2, "what is no bad input is told as ever"


def test_arguments_as_the_harness_reads_them():
    options, sampling = read_arguments(
        {"pretrained": 7, "batch_size": "auto:4", "dtype": "torch.bfloat16", "temperature": 1,
         "block_length": 4, "tokenizer": None}
    )  # fmt: skip
    assert options.pretrained == "7" and options.batch_size is None
    assert options.precision == "bf16" and options.block_size == 4
    assert sampling.temperature == 1.0


def test_a_plain_causal_model_scores_contexts_of_several_lengths(tokenizer, tmp_path):
    """One of transformers' own, without a mask token, in a batch and alone."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=tokenizer.mask_token_id, num_attention_heads=2, max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    plain = train_tokenizer([text.rpartition(" ")[0] for text in PASSAGES], 280)
    words = json.loads(plain._tokenizer.to_str())
    words["added_tokens"].pop()  # the mask token
    plain._tokenizer = type(plain._tokenizer).from_str(json.dumps(words))
    plain.mask_token = None
    plain.save_pretrained(tmp_path)
    requests = [request("loglikelihood", text, " sky dog") for text in (*PASSAGES[:2], "the old")]
    together = BlockDiffusionLM(pretrained=str(tmp_path), device="cpu").loglikelihood(requests)
    alone = BlockDiffusionLM(pretrained=str(tmp_path), device="cpu", batch_size=1)
    for (one, same), (other, greedy) in zip(together, alone.loglikelihood(requests), strict=True):
        assert one == pytest.approx(other, abs=1e-5) and same == greedy


def test_model_args_come_before_lm_evals_own(folders):
    words = f"pretrained={folders / 'four'},batch_size=3,device=cpu,max_length=32"
    own = {"batch_size": "auto", "device": "cuda:0", "max_batch_size": None}
    lm = BlockDiffusionLM.create_from_arg_string(words, own)
    assert (lm.options.batch_size, lm.options.device, lm.max_length) == (3, "cpu", 32)


def test_a_tasks_settings_of_generation():
    base = SamplingOptions(temperature=0.7, top_p=0.9, sampler="threshold", threshold=0.8)
    for wish, temperature in (({}, 0.0), ({"temperature": 0.5}, 0.5), ({"do_sample": True}, 0.7)):
        options, until = generation_options(wish, base)
        assert options.temperature == temperature and options.top_p == 0.9 and until == []
        assert options.max_new_tokens == 256 and options.threshold == 0.8
    options, until = generation_options({"sampler": "ancestral", "steps": 2, "until": "\n"}, base)
    assert options.sampler == "ancestral" and until == ["\n"]
    for wish, message in (({"num_beams": 4}, "'num_beams'"), ({"until": [1]}, "`until`"),
                          ({"do_sample": "yes"}, "`do_sample`")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            generation_options(wish, base)


def test_lm_eval_finds_the_model_though_nobody_imported_it(tmp_path):
    """In a process of its own, by the entry points that pyproject.toml declares."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["lm_eval.models"]["blockdiff"].endswith("harness:BlockDiffusionLM")
    info = tmp_path / "harnessed-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: harnessed\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items())
                for group, names in points.items())
    )  # fmt: skip
    code = (
        "import sys, lm_eval, torch\n"
        "from lm_eval.api.registry import model_registry\n"
        "print('blockdiff' in model_registry, 'hf' in model_registry, 'blockdiff' in sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert done.stdout.split() == ["True", "True", "False"]


def test_elsewhere_importing_torch_does_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "lm_eval")
    monkeypatch.setattr(lm_eval_blockdiff, "register", lambda: pytest.fail("registered"))
    lm_eval_blockdiff.autoload()
