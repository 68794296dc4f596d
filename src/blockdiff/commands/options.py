"""Options as dataclasses say them: an attribute's text is its help, its type what it takes.

A text is the word as it was typed; lists of names and ranges of numbers are checked by the
dataclass itself. Imports nothing heavy, so that help and refusals come at once.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import click
import yaml
from click.core import ParameterSource
from docstring_parser import parse as parse_docstring

from blockdiff.checks import choices_in
from blockdiff.commands.hints import hint_option
from blockdiff.errors import InputError, first_line
from blockdiff.outputs import to_json
from blockdiff.plugins import load_plugin
from blockdiff.recipes import recipe_or_file

# Every command has these, and they are read before the others.
FIRST = {"--config", "--plugin"}


@dataclass(frozen=True)
class Given:
    """What a command was told; what was not given is at its dataclass's default."""

    values: Mapping[str, Any]

    @property
    def named(self) -> frozenset[str]:
        """The options that were given, at their default or not."""
        return frozenset(self.values)

    def make(self, kind: type) -> Any:
        """An instance of one of the command's dataclasses; raises `InputError` as that does."""
        names = [f.name for f in fields(kind) if f.name in self.values]
        return kind(**{name: self.values[name] for name in names})


@dataclass(frozen=True)
class Command:
    """A command: its options' dataclasses, what runs it, and what its help shows.

    `places`: options that may be given by place, without their names, in this order; the last may
    take several words. `sections`: the first option of each section of the help → its title.
    """

    summary: str
    kinds: tuple[type, ...]
    run: Callable[[Given], None]
    sections: Mapping[str, str]
    examples: tuple[str, ...]
    places: tuple[str, ...] = ()
    options: dict[str, Option] = field(init=False)

    def __post_init__(self) -> None:
        found = {one.name: one for kind in self.kinds for one in options_of(kind, self.places)}
        object.__setattr__(self, "options", found)


@dataclass(frozen=True)
class JsonOption:
    """How a result is printed.

    Attributes:
        json: Print JSON.
    """

    json: bool = False


def print_record(given: Given, record: Any, table: Callable[[Any], str]) -> None:
    """Prints a result as JSON where that is asked for, else its table."""
    print(to_json(record, indent=2) if given.make(JsonOption).json else table(record), flush=True)


def as_typed(message: str, command: Command) -> str:
    """A message with its options, `names_in_backticks`, as the command's user types them.

    Advice to name what the command has no option for (", or name it as `text_column`") is left out.
    """

    def possible(found: re.Match[str]) -> str:
        has = found[1] in command.options or f"--{found[1]}" in FIRST
        return found[0] if has else ""

    def typed(found: re.Match[str]) -> str:
        option = command.options.get(found[1])
        if f"--{found[1]}" in FIRST:
            return f"--{found[1]}"
        if option is None or (option.by_place and option.is_required):
            return found[1]
        return option.flag

    message = re.sub(r"[,;] (?:or )?name [^,;`]*`(\w+)`", possible, message)
    return re.sub(r"`(\w+)`", typed, message)


class Option(click.Option):
    """One field of a dataclass."""

    def __init__(self, name: str, text: str, hint: Any, default: Any, by_place: bool) -> None:
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        self.can_be_null = type(None) in parts
        self.is_switch = bool in parts
        self.is_required = default is MISSING
        several = any(get_origin(part) is list for part in parts)
        flag = "--" + name.replace("_", "-")
        if self.is_switch:
            text += f" [on by default; --no-{flag[2:]} turns it off]" if default is True else ""
        elif not (self.is_required or default is None):
            text += f" [default: {default}]"
        super().__init__(
            [name, flag],
            type=_Value(name if by_place and self.is_required else flag, parts, choices_in(hint)),
            help=text,
            multiple=several,
            metavar="" if self.is_switch else None,
        )
        self.flag = flag
        self.by_place = by_place

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None or not self.by_place:
            return record
        return f"{(self.name or '').upper()}, {record[0]}", record[1]


class _Value(click.ParamType):
    """A word's value by click's own types; a refusal says what was expected."""

    def __init__(self, what: str, parts: Sequence[Any], choices: Collection[str] | None) -> None:
        self.what = what
        self.choices = choices
        self.plain: click.ParamType = click.STRING
        self.expected = "text"
        for kind, inner, expected in (
            (bool, click.BOOL, "true or false"),
            (int, click.INT, "a whole number"),
            (float, click.FLOAT, "a number"),
        ):
            if kind in parts and str not in parts:
                self.plain, self.expected = inner, expected
        self.name = self.inner.name

    @property
    def inner(self) -> click.ParamType:
        """click's type; choices as they are now, for a plugin may have added some."""
        return self.plain if self.choices is None else click.Choice(list(self.choices))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self.inner.get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.inner is click.STRING:
            return _text(self.what, value)
        try:
            return self.inner.convert(value, param, ctx)
        except click.BadParameter:
            wanted = f"expected {self.expected}"
            if self.choices is not None:
                wanted = f"choose one of {', '.join(self.choices)}"
            raise InputError(f"{self.what} cannot be {value!r}; {wanted}") from None


def _text(what: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} {text!r} is not valid UTF-8; write it in UTF-8") from None
    return text


def options_of(kind: type, places: Sequence[str] = ()) -> list[Option]:
    """An option for every field of a dataclass and of those it extends."""
    hints = get_type_hints(kind, include_extras=True)
    described = [p for one in kind.__mro__[::-1] for p in parse_docstring(one.__doc__ or "").params]
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in described}
    return [
        Option(f.name, texts[f.name], hints[f.name], f.default, f.name in places)
        for f in fields(kind)
        if not f.metadata.get("from_python")
    ]


class Parser(click.Command):
    """click's command for one of ours."""

    def __init__(self, name: str, command: Command) -> None:
        self.command = command
        recipe = ", or a recipe of the package, for example owt/bd3lm-4" * (name == "train")
        self.config = click.Option(
            ["config", "--config"], multiple=True, is_eager=True, expose_value=False,
            callback=self._read_config, metavar="FILE",
            help=f"YAML file with these options{recipe}.",
        )  # fmt: skip
        self.plugin = click.Option(
            ["plugin", "--plugin"], multiple=True, is_eager=True, expose_value=False,
            callback=lambda ctx, param, names: [load_plugin(name) for name in names],
            metavar="MODULE|FILE.py",
            help="What registers schedules, estimators, objectives, … of your own; may be given "
            "several times.",
        )  # fmt: skip
        self.places = click.Argument(["places"], nargs=-1, type=click.UNPROCESSED)
        examples = "\n".join(f"  {example}" for example in command.examples)
        super().__init__(
            name,
            params=[self.config, self.plugin, *command.options.values(), self.places],
            help=command.summary,
            short_help=command.summary,
            epilog=f"\b\nExamples:\n{examples}",
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        )

    # help

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        pieces = [self.options_metavar or ""]
        for name in self.command.places:
            option = self.command.options[name]
            shown = name.upper() + ("..." if option.multiple else "")
            pieces.append(shown if option.is_required else f"[{shown}]")
        return pieces

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        title = "Options"
        found: dict[str, list[tuple[str, str]]] = {}
        for name, option in self.command.options.items():
            title = self.command.sections.get(name, title)
            found.setdefault(title, []).append(option.get_help_record(ctx) or ("", ""))
        others = [self.config, self.plugin, self.get_help_option(ctx)]
        found["Command line"] = [one.get_help_record(ctx) or ("", "") for one in others if one]
        for title, records in found.items():
            with formatter.section(title):
                formatter.write_dl(records)

    # values

    def read(self, words: Sequence[str]) -> Given:
        """What the words say; raises `InputError` for what they cannot mean."""
        try:
            with self.make_context(f"blockdiff {self.name}", self._switches(words)) as ctx:
                given = self._given(ctx)
        except click.NoSuchOption as error:
            raise InputError(self._unknown("option", error.option_name)) from None
        except click.UsageError as error:
            raise InputError(error.message.rstrip(".")) from None
        for name, option in self.command.options.items():
            if option.is_required and name not in given:
                what = name if name in self.command.places else option.flag
                raise InputError(f"{what} is missing; for example: {self.command.examples[0]}")
        return Given(given)

    def _switches(self, words: Sequence[str]) -> list[str]:
        """The words as click reads them: what is given by place behind a `--`.

        A bare `--switch` becomes `--switch=true`, `--no-switch` false; values are left alone. What
        others depend on, a plugin's names for example, comes first.
        """
        switches = {o.flag: o for o in self.command.options.values() if o.is_switch}
        takes_value = {o.flag for o in self.command.options.values()} - set(switches) | FIRST
        found: list[str] = []
        first: list[str] = []
        places: list[str] = []
        left = list(words)
        while left:
            word = left.pop(0)
            if word == "--":
                places += left
                break
            name, equals, value = word.partition("=")
            flag = name.replace("_", "-")
            if not word.startswith("-") or word == "-" or " " in name:
                places.append(word)
            elif equals or not flag.startswith("--"):
                (first if flag in FIRST else found).append(flag + equals + value)
            elif flag in takes_value:
                # A prompt may be any text; elsewhere an option's name is a value left out.
                if not left:
                    raise InputError(f"{flag} needs a value")
                if left[0] in takes_value | set(switches) and flag != "--prompt":
                    raise InputError(f"{flag} needs a value, not the option {left[0]}")
                (first if flag in FIRST else found).extend([flag, left.pop(0)])
            elif flag in switches:
                says = left.pop(0) if left and left[0].lower() in ("true", "false") else "true"
                found.append(f"{flag}={says}")
            elif flag.startswith("--no-") and "--" + flag[5:] in switches:
                found.append(f"--{flag[5:]}=false")
            else:
                found.append(word)
        return [*first, *found, "--", *places]

    def _given(self, ctx: click.Context) -> dict[str, Any]:
        given, typed = {}, set()
        for name, option in self.command.options.items():
            source = ctx.get_parameter_source(name)
            if source == ParameterSource.DEFAULT:
                continue
            if source == ParameterSource.COMMANDLINE:
                typed.add(name)
            value = ctx.params[name]
            given[name] = list(value) if option.multiple else value
        words = [_text("the argument", word) for word in ctx.params["places"]]
        for name in self.command.places:
            option = self.command.options[name]
            if option.multiple:
                if words:
                    given[name] = words + (given[name] if name in typed else [])
                    words = []
            elif words and name not in typed:
                given[name] = option.type.convert(words.pop(0), option, ctx)
        if words:
            raise InputError(
                f"{words[0]!r} is one argument too many; put a text of several words into quotes, "
                f"and see blockdiff {self.name} --help"
            )
        for name, value in given.items():
            if isinstance(value, list) and len(value) == 1:
                given[name] = value[0]
        return given

    def _unknown(self, what: str, name: str) -> str:
        flags = [option.flag[2:] for option in self.command.options.values()]
        near = hint_option(name, [*flags, "config", "plugin", "help"])
        dash = "--" if what == "option" else ""
        hint = f"did you mean {dash}{near}?" if near else f"see blockdiff {self.name} --help"
        return f"unknown {what} {name}; {hint}"

    def _read_config(self, ctx: click.Context, _: click.Parameter, paths: Sequence[str]) -> None:
        found: dict[str, Any] = {}
        for path in paths:
            file = recipe_or_file(Path(path)) if self.name == "train" else Path(path)
            for key, node in read_yaml(file).items():
                name = key.replace("-", "_")
                if name == "plugin":
                    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
                    for one in nodes:
                        load_plugin(str(one.value))
                    continue
                if name not in self.command.options:
                    raise InputError(f"{path}: {self._unknown('key', key)}")
                found[name] = _value(f"{path}: {key}", node, self.command.options[name])
        ctx.default_map = found


def read_yaml(path: Path) -> dict[str, yaml.Node]:
    """key → node of a YAML file; raises `InputError` where it cannot be read or has no keys."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"--config {path}: {first_line(error)}; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path} is not valid UTF-8 (byte {error.start})") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise InputError(f"--config {path} is not valid YAML{line}: {problem}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config {path} holds no keys; write one `name: value` a line")
    found: dict[str, yaml.Node] = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in found:
            raise InputError(
                f"--config {path}, line {key.start_mark.line + 1}: "
                + ("a key must be text" if not isinstance(key, yaml.ScalarNode)
                   else f"{key.value} is there twice")
            )  # fmt: skip
        found[key.value] = node
    return found


def _value(where: str, node: yaml.Node, option: Option) -> Any:
    """A node's text as it was written, as a word on the command line would be; None for null."""
    if isinstance(node, yaml.SequenceNode) and option.multiple:
        return [one for inner in node.value for one in _value(where, inner, option) or ()]
    if not isinstance(node, yaml.ScalarNode):
        raise InputError(f"{where} is no single value; write one")
    if node.tag == "tag:yaml.org,2002:null":
        if not option.can_be_null:
            raise InputError(f"{where} is null; give a value or leave the key out")
        return None
    return [node.value] if option.multiple else node.value
