"""Plugins: what is registered from outside is a name like any other; no code comes uninvited."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockdiff
from blockdiff import cli, plugins, registry
from blockdiff.registry import Registry

REGISTRIES = [x for x in vars(registry).values() if isinstance(x, Registry)]
PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
TINY = [
    "--steps", "2", "--batch-size", "2", "--length", "8", "--vocab-size", "270", "--save-every",
    "1", "--eval-windows", "2", "--report-to", "none", "--dropout", "0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    """What a plugin registered is gone after each test."""
    yield
    forget()


def forget():
    """As a new process knows nothing of a plugin."""
    for one in REGISTRIES:
        for name in [name for name in one._objects if name not in one._modules]:
            del one._objects[name]
    plugins._loaded.clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("The law of the land is the law of the sea. " * 60)
    return tmp_path


@pytest.fixture
def mine(here):
    """The plugin of docs/extending.md, as it stands there."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    Path("mine.py").write_text(found[0], encoding="utf-8")
    return "mine.py"


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("blockdiff: error: ")
    return line


def test_the_page_is_run_as_it_stands(mine, capsys):
    """Its commands, smaller: adding the four kinds touches no file of the package."""
    commands = re.findall(r"^blockdiff (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert [line.split()[0] for line in commands] == ["train", "evaluate", "generate"]
    smaller = {"train": TINY, "evaluate": ["--windows", "2", "--json"], "generate": [
        "--max-new-tokens", "4", "--json"]}  # fmt: skip
    for line in commands:
        words = line.replace('"', "").split()
        cli.main([*words, *smaller[words[0]]])
    assert json.loads(Path("runs/mine/config.json").read_text())["objective"] == "even"
    run = json.loads(Path("runs/mine/run.json").read_text())
    assert (run["schedule"], run["estimator"]) == ("cubic", "antithetic")
    assert run["run"]["plugins"] == [str(Path("mine.py").resolve())]
    said = capsys.readouterr().out
    assert '"antithetic"' in said
    assert '"nfe"' in said


def test_its_parts_do_what_the_page_says(mine):
    import torch

    from blockdiff.estimators import make_estimator
    from blockdiff.layout import BlockLayout
    from blockdiff.noising import stratified_noise
    from helpers import random_tokens, tiny_model

    plugins.load_plugin(mine)
    model = tiny_model(vocab_size=9, length=8, block_size=2)
    x_0 = random_tokens(model, 4, 8)
    exact = blockdiff.likelihood(model, x_0, "enumerate")
    drawn = blockdiff.likelihood(model, x_0, "antithetic", draws=400, schedule="cubic")
    assert abs(drawn.nats_per_token - exact.nats_per_token) < 4 * drawn.mask_stderr
    noise = stratified_noise(4, BlockLayout(8, 2), torch.Generator().manual_seed(0))
    maskable = torch.ones(4, 8, dtype=torch.bool)
    draw = make_estimator("antithetic", "cubic")(x_0, BlockLayout(8, 2), noise, maskable, 8)
    even = registry.OBJECTIVES.find("even").nats(model, x_0, draw)
    once = (draw.x_t == 8).view(2, 4, 8).sum(0) > 0
    assert torch.equal(even > 0, once), "only masked tokens count"


def test_names_of_a_plugin_stand_in_help_and_yaml(mine, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help", "--plugin", mine])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("cubic", "antithetic", "even", "--plugin"))
    forget()
    line = refused(capsys, "train", "--schedule", "cubic")
    assert "cubic" in line and "logarithmic" in line
    Path("run.yaml").write_text(f"schedule: cubic\nplugin: [{mine}]\n")
    name, given = cli.parse(["train", "--config", "run.yaml"])
    assert given.values == {"schedule": "cubic"} and name == "train"


def test_a_folder_says_which_objective_is_missing(mine, capsys):
    words = ["train", "notes.txt", "--plugin", mine, "--objective", "even", "--out", "out"]
    cli.main([*words, *TINY])
    forget()
    capsys.readouterr()
    line = refused(capsys, "generate", "out", "The")
    assert "objective 'even'" in line and "as --plugin" in line
    assert "even" not in registry.OBJECTIVES, "a folder loads no code"
    line = refused(capsys, "train", "--out", "out", "--resume", "--steps", "3")
    assert "objective 'even'" in line and f"give --plugin {Path(mine).resolve()}" in line
    cli.main(["train", "--out", "out", "--resume", "--steps", "3", "--plugin", mine])
    assert json.loads(Path("out/run.json").read_text())["objective"] == "even"


def test_a_run_of_a_plugins_estimator_is_measured_without_it(mine, capsys):
    """Its model is an ordinary one; only to go on training needs the plugin."""
    cli.main(["train", "notes.txt", "--plugin", mine, "--estimator", "antithetic", "--schedule",
              "cubic", "--out", "out", *TINY])  # fmt: skip
    forget()
    capsys.readouterr()
    cli.main(["evaluate", "out", "notes.txt", "--windows", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["part"] == "validation"
    line = refused(capsys, "train", "--out", "out", "--resume", "--steps", "3")
    assert "estimator 'antithetic'" in line or "schedule 'cubic'" in line


WRONG = {
    "raise RuntimeError('a\\nb')": "the plugin wrong.py cannot be used: RuntimeError: a b",
    "def (": "the plugin wrong.py cannot be used: SyntaxError",
    "import no_such_thing": "ModuleNotFoundError: No module named 'no_such_thing'",
    "raise SystemExit(3)": "the plugin wrong.py cannot be used: SystemExit: 3",
    "import blockdiff, dataclasses\nfrom blockdiff.registry import SCHEDULES\n"
    "blockdiff.register_schedule(dataclasses.replace(SCHEDULES['linear']))":
    "the plugin wrong.py cannot be used: there is a schedule called 'linear' already",
    "import blockdiff\nblockdiff.register_estimator(object())": "an estimator needs a name",
}  # fmt: skip


@pytest.mark.parametrize("code", WRONG)
def test_what_is_wrong_with_a_plugin_is_one_line(code, here, capsys):
    Path("wrong.py").write_text(code)
    for command in ("train", "generate"):
        assert WRONG[code] in refused(capsys, command, "starter", "--plugin", "wrong.py")


def test_a_plugin_that_is_not_there(here, capsys):
    assert "there is no plugin file gone.py" in refused(capsys, "train", "--plugin", "gone.py")
    assert "there is no module gone" in refused(capsys, "train", "--plugin", "gone")
    assert "--plugin needs a value" in refused(capsys, "train", "--plugin")
    assert "did you mean --plugin" in refused(capsys, "train", "--plugins", "mine.py")


def test_a_plugin_is_imported_once_and_several_may_be_given(here):
    for name in ("one", "two"):
        Path(f"{name}.py").write_text(
            "import blockdiff, dataclasses\nfrom blockdiff.registry import SCHEDULES\n"
            f"blockdiff.register_schedule(dataclasses.replace(SCHEDULES['linear'], name='{name}'))"
        )
    words = ["--plugin", "one.py", "--plugin=two.py", "--plugin", "./one.py"]
    _, given = cli.parse(["train", "--schedule", "two", *words])
    assert given.values == {"schedule": "two"}
    assert plugins.loaded_plugins() == [
        str(Path(f"{name}.py").resolve()) for name in ("one", "two")
    ]


def test_an_estimator_that_cannot_draw_is_refused_before_the_text_is_read(here, capsys):
    Path("odd.py").write_text(
        "import blockdiff\n"
        "blockdiff.register_estimator(blockdiff.Estimator('odd', lambda *_, **__: None))"
    )
    words = ["train", "no-such-file.txt", "--plugin", "odd.py", "--estimator", "odd"]
    assert "estimator odd gave no Draw" in refused(capsys, *words, "--out", "out")
    words = ["train", "no-such-file.txt", "--estimator", "enumerate", "--block-size", "16"]
    assert "2^16 - 1 passes" in refused(capsys, *words, "--out", "out")


@pytest.mark.parametrize(
    "change",
    ["x_t=d.x_t[:, :4]", "weight=d.weight[:1, :3]", "weight=3", "x_t=d.x_t.float()",
     "x_t=d.x_t[0]", "sigma=d.sigma[:, :1]", "x_t=d.x_t.repeat(2, 1)", "weight=d.weight * math.nan",
     "weight=-d.weight"],
)  # fmt: skip
def test_a_draw_that_does_not_fit_is_one_line(change, here, capsys):
    Path("odd.py").write_text(
        "import blockdiff, dataclasses, math\nfrom blockdiff.noising import exact_k\n"
        "def odd(*given):\n    d = exact_k(*given)\n"
        f"    return dataclasses.replace(d, {change})\n"
        "blockdiff.register_estimator(blockdiff.Estimator('odd', odd))"
    )
    words = ["train", "no-such-file.txt", "--plugin", "odd.py", "--estimator", "odd"]
    assert "the estimator odd" in refused(capsys, *words, "--out", "out")


def test_the_command_line_with_a_plugin_starts_without_torch(here):
    """A plugin imports what it needs; without its own imports none is loaded."""
    Path("light.py").write_text("answer = 42")
    code = (
        "import sys; from blockdiff import cli; "
        "cli.parse(['train', '--plugin', 'light.py', '--schedule', 'cosine']); "
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_python_takes_objects_as_well_as_names(mine):
    from dataclasses import replace

    schedule = replace(registry.SCHEDULES["cosine"], name="own")
    estimator = replace(registry.ESTIMATORS["exact_k"], name="own_k")
    config = blockdiff.TrainConfig(schedule=schedule, estimator=estimator)
    assert (config.schedule, config.estimator) == ("own", "own_k")
    assert registry.SCHEDULES.find("own") is schedule
    with pytest.raises(blockdiff.InputError, match="is unknown"):
        blockdiff.TrainConfig(schedule=object())
    options = blockdiff.SamplingOptions(schedule=replace(schedule, name="not_registered"))
    assert options.schedule.alpha is schedule.alpha
