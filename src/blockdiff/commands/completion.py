"""`blockdiff completion`: what the shell offers on Tab, by click's protocol with each shell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
)

from blockdiff.commands.options import FIRST, Command, Given, Option
from blockdiff.recipes import recipes

# The shell asks by running `blockdiff` with this in its environment.
VARIABLE = "_BLOCKDIFF_COMPLETE"
Items = list[CompletionItem[str]]

# Names that stand beside files, by option; other texts may be any, and files are offered.
_NAMES = {
    "data": ("pydoc",),
    "device": ("auto", "cpu", "cuda", "mps"),
    "init_from": ("starter",),
    "model": ("starter",),
    "models": ("starter",),
    "reference": ("pydoc",),
    "report_to": ("tensorboard", "wandb", "none"),
    "validation_data": ("pydoc",),
}
_FOLDERS = {"init_from", "judge", "model", "models", "out", "tokenizer"}
_NO_FILES = {"device", "prompt", "report_to"}
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            dir) compopt -o filenames; COMPREPLY+=($(compgen -d -- "$2")) ;;
            file) compopt -o filenames; COMPREPLY+=($(compgen -f -- "$2")) ;;
        esac
    done < <(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@dataclass(frozen=True)
class CompletionOptions:
    """Print what makes a shell complete commands, options and their values on Tab.

    Attributes:
        shell: For which shell. In ~/.bashrc: eval "$(blockdiff completion bash)"; zsh alike in
            ~/.zshrc; fish: blockdiff completion fish > ~/.config/fish/completions/blockdiff.fish.
    """

    shell: Literal["bash", "zsh", "fish"]


def _run(given: Given) -> None:
    print(_shell(given.make(CompletionOptions).shell).source(), end="")


def asked() -> str | None:
    """What a shell asks this process for, if one does."""
    return os.environ.get(VARIABLE)


def answer(instruction: str, commands: Mapping[str, Command]) -> None:
    """Prints what a shell asked for, its script ("bash_source") or words ("bash_complete")."""
    shell, _, wanted = instruction.partition("_")
    if shell in _SHELLS:
        asking = _shell(shell, commands)
        print(asking.source() if wanted == "source" else asking.complete())


def completions(words: list[str], begun: str, commands: Mapping[str, Command]) -> Items:
    """What may stand next behind `words`, the program's name not among them.

    `begun`: what is typed of it; it may be an option and its value in one, `--sampler=ver`.
    """
    words = [word for word in words if word != "="]  # bash cuts --option=value into three
    begun = "" if begun == "=" else begun
    if not words or words == ["help"]:
        names = {name: command.summary for name, command in commands.items()}
        more = {} if words else {"--help": "Show the commands.", "--version": ""}
        return _plain(names | more, begun)
    command = commands.get(words[0].replace("_", "-"))
    if command is None:
        return []
    flags = {option.flag: option for option in command.options.values()}
    flag, equals, value = begun.partition("=")
    if equals and flag in {*flags, *FIRST}:
        return [CompletionItem(f"{flag}={item.value}") for item in _values(flag, flags, value)
                if item.type == "plain"]  # fmt: skip
    typed = list(_typed(words[1:], command))
    if typed and typed[-1] == (words[-1], None):
        return _values(words[-1], flags, begun)
    if begun.startswith("-"):
        return _flags(command, {flag for flag, _ in typed}, begun)
    places = sum(not flag for flag, _ in typed)
    free = [name for name in command.places if command.options[name].flag not in dict(typed)]
    if free and (places < len(free) or command.options[free[-1]].multiple):
        return _values(command.options[free[min(places, len(free) - 1)]].flag, flags, begun)
    return []


def _typed(words: list[str], command: Command) -> Iterator[tuple[str, str | None]]:
    """(option, its value) of each; "" for what is given by place, a value of None is to come."""
    takes = {o.flag for o in command.options.values() if not o.is_switch} | FIRST
    left = list(words)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        flag = flag.replace("_", "-")
        if not flag.startswith("-"):
            yield "", flag
        elif flag in takes and not equals:
            yield flag, left.pop(0) if left else None
        else:
            yield flag, value


def _flags(command: Command, given: set[str], begun: str) -> Items:
    found = {"--config": "YAML file with options", "--plugin": "Module or file", "--help": ""}
    for option in command.options.values():
        if option.multiple or option.flag not in given:
            found[option.flag] = option.help or ""
        if option.is_switch and "[on by default" in (option.help or ""):
            found[f"--no-{option.flag[2:]}"] = ""
    return _plain(found, begun)


def _values(flag: str, flags: dict[str, Option], begun: str) -> Items:
    if flag in FIRST:
        known = list(recipes()) if flag == "--config" and "--objective" in flags else []
        return [*_plain(known, begun), CompletionItem(begun, type="file")]
    option, takes = flags[flag], cast(Any, flags[flag].type)
    if takes.choices is not None:
        return _plain(takes.choices, begun)
    if option.is_switch or takes.plain is not click.STRING:
        return _plain(("true", "false"), begun) if option.is_switch else []
    name = option.name or ""
    names = _plain(_NAMES.get(name, ()), begun)
    kind = "dir" if name in _FOLDERS else "file"
    return names if name in _NO_FILES else [*names, CompletionItem(begun, type=kind)]


def _plain(names: Iterable[str], begun: str) -> Items:
    """Those that begin so; a mapping's values are their help."""
    helps = names if isinstance(names, dict) else {}
    return [CompletionItem(name, help=str(helps.get(name) or "") or None)
            for name in names if name.startswith(begun)]  # fmt: skip


class _Ours(ShellComplete):
    def get_completions(self, args: list[str], incomplete: str) -> Items:
        return completions(args, incomplete, self.ctx_args["commands"])


class _Bash(_Ours, BashComplete):
    source_template = _BASH  # click's forgets names where files are offered, too


class _Zsh(_Ours, ZshComplete): ...


class _Fish(_Ours, FishComplete): ...


_SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}


def _shell(name: str, commands: Mapping[str, Command] | None = None) -> ShellComplete:
    known = {"commands": commands or {}}
    return _SHELLS[name](click.Command("blockdiff"), known, "blockdiff", VARIABLE)


COMMAND = Command(
    summary="Complete commands, options and their values on Tab, in bash, zsh or fish.",
    kinds=(CompletionOptions,),
    run=_run,
    places=("shell",),
    sections={"shell": "Completion"},
    examples=("blockdiff completion bash > completion.bash",),
)
