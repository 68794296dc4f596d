"""Names of what can be chosen: known before anything is imported, and never twice."""

import subprocess
import sys
from dataclasses import replace

import pytest

import blockdiff
from blockdiff import registry
from blockdiff.errors import InputError
from blockdiff.registry import SCHEDULES, Choices, Registry

ALL = [x for x in vars(registry).values() if isinstance(x, Registry)]


@pytest.fixture
def mine():
    """A schedule of one's own, forgotten afterwards."""
    schedule = replace(SCHEDULES.find("linear"), name="mine")
    yield schedule
    SCHEDULES._objects.pop("mine", None)


@pytest.mark.parametrize("known", ALL, ids=lambda x: x.what)
def test_what_the_table_says_is_what_the_modules_register(known):
    for name in known:
        assert known[name].name == name
        for fact, names in known._facts.items():
            assert bool(getattr(known[name], fact)) == (name in names)
            if names and any(any(words) for words in names.values()):
                assert sorted(known.words(fact, name)) == sorted(getattr(known[name], fact))
    modules = set(known._modules.values())
    assert set(known) == {name for name, module in known._modules.items() if module in modules}


def test_an_object_is_known_by_its_name_once_it_is_registered(mine):
    assert "mine" not in SCHEDULES
    assert blockdiff.register_schedule(mine) is mine
    assert blockdiff.register_schedule(mine) is mine, "the same object again does nothing"
    assert SCHEDULES.find("mine") is mine and "mine" in list(SCHEDULES)


def test_an_object_may_stand_for_its_name(mine):
    assert SCHEDULES.find(mine) is mine and "mine" not in SCHEDULES
    assert registry.name_of(mine) == registry.name_of("mine") == "mine"


def test_a_name_is_given_once(mine):
    blockdiff.register_schedule(mine)
    with pytest.raises(InputError, match="there is a schedule called 'mine' already"):
        blockdiff.register_schedule(replace(mine))
    with pytest.raises(InputError, match="there is a schedule called 'cosine' already"):
        blockdiff.register_schedule(replace(mine, name="cosine"))


def test_a_name_of_the_package_is_taken_before_its_module_is_imported():
    code = (
        "import blockdiff\nfrom blockdiff.registry import SCHEDULES\n"
        "class Mine: alpha = mask_rate = weight = inverse = None; name = 'linear'\n"
        "try: SCHEDULES.register(Mine())\n"
        "except blockdiff.InputError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "there is a schedule called 'linear' already" in run.stdout


@pytest.mark.parametrize("name", ["", "a,b", "a:b", "a+b", "a b", None, 3, "-a"])
def test_a_name_can_stand_in_a_list(mine, name):
    with pytest.raises(InputError, match="a schedule needs a name"):
        blockdiff.register_schedule(replace(mine, name=name))


def test_what_an_object_must_have_is_asked_for_at_once():
    class Half:
        name, alpha, weight = "half", None, None

    with pytest.raises(InputError, match="the schedule 'half' has no mask_rate and no inverse"):
        blockdiff.register_schedule(Half())
    with pytest.raises(InputError, match="is unknown"):
        SCHEDULES.find(Half())


def test_an_unknown_name_is_refused_with_the_names_there_are(mine):
    blockdiff.register_schedule(mine)
    with pytest.raises(InputError, match=r"`noise` 'mina' is unknown; .* linear, .*, mine$"):
        SCHEDULES.find("mina", "noise")
    for wrong in (None, 3, ["linear"]):
        with pytest.raises(InputError, match="is unknown"):
            SCHEDULES.find(wrong)


def test_choices_are_looked_up_when_they_are_asked_for(mine):
    found = Choices(SCHEDULES, also=("auto",))
    before = list(found)
    assert before[0] == "auto" and before[1:] == list(SCHEDULES)
    blockdiff.register_schedule(mine)
    assert list(found) == [*before, "mine"] and "mine" in found and len(found) == len(before) + 1
    assert list(Choices(SCHEDULES, "no_such_fact")) == []
