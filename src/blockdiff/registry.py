"""What can be chosen by name: schedules, estimators, objectives, orders and stopping rules.

A registry knows the names of what the package brings without importing it, so that the command
line shows and checks them before torch is loaded; the object is imported when it is looked up. What
is registered from outside stands beside it: help, checks and YAML files ask the registry.

A new one of the package's own is an object in its module and its name in the table below. One from
outside is the object and a call: `blockdiff.register_schedule(Schedule(name="mine", …))`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from blockdiff.errors import InputError

if TYPE_CHECKING:
    from blockdiff.estimators import Estimator
    from blockdiff.laws import Objective
    from blockdiff.sampling.orders.base import Order
    from blockdiff.sampling.stopping import StoppingRule
    from blockdiff.schedules import Schedule

T = TypeVar("T")
# No comma, colon or plus sign: names stand in lists such as bernoulli:cosine,exact_k+stratified.
_NAME = re.compile(r"\w[\w.-]*")


class Registry(Mapping[str, T], Generic[T]):
    """Objects by the `name` they carry; as a mapping, name → object in the order of the names.

    Example:
        >>> import blockdiff
        >>> from blockdiff.registry import SCHEDULES
        >>> "cosine" in SCHEDULES, SCHEDULES.find("cosine").name
        (True, 'cosine')
    """

    def __init__(
        self,
        what: str,
        asked: Sequence[str] = (),
        built_in: Mapping[str, str] | None = None,
        **facts: str | Mapping[str, str],
    ) -> None:
        """`what`: one of them, for messages. `asked`: attributes that each must have.

        `built_in`: module of the package → the names it registers when it is imported, with blanks
        between them. `facts`: attribute → those of the built-in names for which it is true, or name
        → the words that it holds, where that must be known before torch is loaded (a test compares
        them with the objects).
        """
        self.what = what
        self.asked = tuple(asked)
        names = (built_in or {}).items()
        self._modules = {name: module for module, found in names for name in found.split()}
        self._facts = {
            fact: dict.fromkeys(found.split(), ("",))
            if isinstance(found, str)
            else {name: tuple(words.split()) for name, words in found.items()}
            for fact, found in facts.items()
        }
        self._objects: dict[str, T] = {}

    def register(self, thing: T) -> T:
        """Makes `thing` known by its `name`, and returns it.

        Registering the same object again does nothing. Raises `InputError` for another object of a
        name that is taken, a name that cannot stand in a list, or an object that lacks something.

        Example:
            >>> from blockdiff import Schedule
            >>> from blockdiff.registry import Registry
            >>> cubic = Schedule(
            ...     name="cubic", alpha=lambda t: 1 - t**3, mask_rate=lambda t: t**3,
            ...     weight=lambda t: 3 / t, inverse=lambda rate: rate ** (1 / 3),
            ... )
            >>> mine = Registry("schedule")  # blockdiff.register_schedule is that of SCHEDULES
            >>> mine.register(cubic) is cubic, list(mine)
            (True, ['cubic'])
        """
        name = getattr(thing, "name", None)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"{_article(self.what)} needs a name of letters, digits, '_', '-' and '.', not "
                f"{name!r}"
            )
        lacks = [one for one in self.asked if not hasattr(thing, one)]
        if lacks:
            raise InputError(f"the {self.what} {name!r} has no {' and no '.join(lacks)}")
        known = self._known(name)
        if known is not None and known is not thing:
            raise InputError(
                f"there is {_article(self.what)} called {name!r} already; give the new one another "
                "name"
            )
        self._objects[name] = thing
        return thing

    def find(self, chosen: str | T, option: str | None = None) -> T:
        """The object called `chosen`; an object that is not text is returned as it is.

        `option`: what the choice is called in a refusal, if not by the kind of object. Raises
        `InputError` with the names there are.
        """
        if isinstance(chosen, str) and chosen in self:
            return self[chosen]
        if not isinstance(chosen, str) and self.is_object(chosen):
            return chosen
        raise InputError(
            f"`{option or self.what}` {chosen!r} is unknown; choose one of {', '.join(self)}"
        )

    def is_object(self, chosen: object) -> bool:
        """Whether `chosen` is one of the things themselves, registered or not."""
        return not isinstance(chosen, str) and all(
            hasattr(chosen, one) for one in ("name", *self.asked)
        )

    def has(self, name: str, fact: str) -> bool:
        """Whether the attribute `fact` of what is called `name` is true; imports nothing."""
        if name in self._objects or fact not in self._facts:
            return bool(getattr(self.get(name), fact, False))
        return name in self._facts[fact]

    def words(self, fact: str, chosen: str | T | None = None) -> tuple[str, ...]:
        """The words that attribute `fact` of what is `chosen` holds; None: of all in the table.

        Of what the package brings it imports nothing.
        """
        table = self._facts[fact]
        if chosen is None:
            return tuple(dict.fromkeys(word for words in table.values() for word in words))
        if isinstance(chosen, str) and chosen in self._modules:
            return table.get(chosen, ())
        thing = self.get(chosen) if isinstance(chosen, str) else chosen
        return tuple(getattr(thing, fact, ()))

    def __getitem__(self, name: str) -> T:
        known = self._known(name)
        if known is None:
            raise KeyError(name)
        return known

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._objects

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._modules, *self._objects]))

    def __len__(self) -> int:
        return len(self._modules.keys() | self._objects.keys())

    def _known(self, name: str) -> T | None:
        # A module that registers is itself being imported: then this import does nothing.
        if name not in self._objects and name in self._modules:
            import_module(self._modules[name])
        return self._objects.get(name)


@dataclass(frozen=True, eq=False)  # hashed as what it is: types with it may be part of a union
class Choices(Collection[str]):
    """Some of a registry's names, as they are when one looks: those with a fact, and a few words.

    `also`: words that stand before the names, such as auto. A dataclass says that its field is one
    of them by `Annotated[str, Choices(…)]`; command line, YAML and checks read it there.
    """

    registry: Registry[Any]
    fact: str | None = None
    also: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        yield from self.also
        for name in self.registry:
            if self.fact is None or self.registry.has(name, self.fact):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == one for one in self)

    def takes(self, value: object) -> bool:
        """Whether `value` is an object that may stand in the place of a name."""
        return self.registry.is_object(value) and (
            self.fact is None or bool(getattr(value, self.fact, False))
        )


def name_of(chosen: Any) -> str:
    """The name of what may be chosen by name or as an object."""
    return chosen if isinstance(chosen, str) else str(chosen.name)


def _article(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    ("alpha", "mask_rate", "weight", "inverse"),
    {"blockdiff.schedules": "linear cosine square square_root logarithmic"},
)
ESTIMATORS: Registry[Estimator] = Registry(
    "estimator",
    ("draw", "reads", "unbiased"),
    {"blockdiff.estimators": "enumerate exact_k paired bernoulli d3pm bell clipped clipped_redraw"},
    unbiased="enumerate exact_k paired bernoulli d3pm",
    needs_clip="clipped clipped_redraw",
)
OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    ("nats", "block_size", "network", "noised", "counted"),
    {"blockdiff.laws": "bd3lm mdlm sedd ar", "blockdiff.drafting": "joint draft"},
    any_blocks="bd3lm joint draft",
    shifts="joint",
    trains="draft",
)
# `reads`: the settings that an order takes; `needs`: those of them it cannot do without. Where none
# is chosen, the first that reads all that is set is meant.
ORDERS: Registry[Order] = Registry(
    "order",
    ("wanted", "mask_rate", "choose", "reads", "needs", "only", "fills_block", "edits", "verifies"),
    {
        "blockdiff.sampling.orders.confidence": "confidence threshold margin entropy entropy_bound",
        "blockdiff.sampling.orders.editing": "editing",
        "blockdiff.sampling.orders.scheduled": "first_hitting ancestral analytic",
        "blockdiff.sampling.orders.verified": "verified",
    },
    reads={
        "confidence": "steps tokens_per_step remasking",
        "threshold": "steps tokens_per_step threshold",
        "margin": "steps tokens_per_step margin",
        "entropy": "steps tokens_per_step",
        "entropy_bound": "steps tokens_per_step entropy_bound",
        "editing": "steps tokens_per_step threshold edit_threshold",
        "first_hitting": "schedule",
        "ancestral": "steps schedule",
        "analytic": "steps schedule",
        "verified": "drafts drafter",
    },
    needs={"ancestral": "steps", "analytic": "steps"},
)
STOPPING_RULES: Registry[StoppingRule] = Registry(
    "stopping rule",
    ("length", "rejects"),
    {"blockdiff.sampling.stopping": "eos second_eos low_entropy"},
)

# What the `generate` of a transformers model calls: the model is a floor below its sampler.
GENERATION: Registry[Any] = Registry(
    "way to generate", ("generate",), {"blockdiff.sampling.as_transformers": "transformers"}
)

register_schedule = SCHEDULES.register
register_estimator = ESTIMATORS.register
register_objective = OBJECTIVES.register
register_order = ORDERS.register
register_stopping_rule = STOPPING_RULES.register

# Types of fields, for what stands on the command line.
ScheduleName = Annotated[str, Choices(SCHEDULES)]
EstimatorName = Annotated[str, Choices(ESTIMATORS)]
BoundName = Annotated[str, Choices(ESTIMATORS, "unbiased", ("auto",))]
ObjectiveName = Annotated[str, Choices(OBJECTIVES)]
OrderName = Annotated[str, Choices(ORDERS, also=("auto",))]
