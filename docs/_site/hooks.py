"""Pages that mkdocs makes of what stands elsewhere: options, notebooks, the card, how to cite.

Links out of docs/ are led to the site's own pages where there is one, and else to the repository.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
import tomllib
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import click
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from blockdiff.commands import COMMANDS
from blockdiff.commands.options import Command, Parser

ROOT = Path(__file__).parents[2]
# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CITATION.cff": "cite.md",
    "src/blockdiff/starter/README.md": "starter.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#|/)([^)\s#]*)(#[^)\s]*)?\)")
# What in a help text is code: in backticks, an option, a special token.
_CODE = re.compile(r"`[^`]+`|(?<![\w-])--[a-z][\w-]*|&lt;\|\w+\|&gt;")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made: dict[str, str | bytes] = {"options.md": options_page(), "cite.md": cite_page()}
    for source, page in PAGES.items():
        if source.endswith(".md") and page != "index.md":
            made[page] = (ROOT / source).read_text("utf-8")
    for path in sorted(ROOT.glob("docs/notebooks/*.ipynb")):
        made |= notebook_pages(path)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == here), f"docs/{here}")
    if here == "index.md":
        source = "docs/index.md"
    parts = re.split(r"^( *```.*?^ *```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(led(part, source, here) if i % 2 == 0 else part for i, part in enumerate(parts))


def led(markdown: str, source: str, page: str) -> str:
    """The links of a file `source` of the repository, as they are from the site's `page`."""

    def one(found: re.Match[str]) -> str:
        text, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES or path.startswith("docs/"):
            inside = PAGES.get(path) or path.removeprefix("docs/").replace(".ipynb", ".md")
            target = posixpath.relpath(inside, posixpath.dirname(page) or ".")
        elif url := repository():
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            target = f"{url}/{kind}/main/{path}"
        else:
            return f"{text} (`{path}`)"
        return f"[{text}]({target}{anchor})"

    return _LINK.sub(one, markdown)


def repository() -> str | None:
    """Where the code is, if pyproject.toml says so."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    urls = {name.lower(): url.rstrip("/") for name, url in project.get("urls", {}).items()}
    return next((urls[name] for name in ("repository", "source", "homepage") if name in urls), None)


# Options


def options_page() -> str:
    parts = [
        "# Every option\n\nThis page is what `blockdiff COMMAND --help` says, made from the "
        "same dataclasses. `--config FILE` reads any of these from YAML; `--plugin` loads "
        "[what you register](extending.md). `_` and `-` in a name are the same; a switch that is "
        "on is turned off by `--no-NAME`.\n"
    ]
    parts += (command_section(name, command) for name, command in COMMANDS.items())
    return "\n".join(parts)


def command_section(name: str, command: Command) -> str:
    parser = Parser(name, command)
    context = click.Context(parser, info_name=f"blockdiff {name}")
    usage = " ".join([f"blockdiff {name}", *parser.collect_usage_pieces(context)])
    examples = "\n".join(command.examples)
    rows = "\n".join(option_rows(name, command, context))
    return (
        f"## {name}\n\n{command.summary}\n\n```text\n{usage}\n```\n\n```bash\n{examples}\n```\n\n"
        f'<table class="options">\n{rows}\n</table>\n'
    )


def option_rows(name: str, command: Command, context: click.Context) -> Iterator[str]:
    for field, option in command.options.items():
        if field in command.sections:
            yield f'<tr><th colspan="2">{html.escape(command.sections[field])}</th></tr>'
        record = option.get_help_record(context)
        assert record is not None
        words, text = map(html.escape, record)
        text = _CODE.sub(lambda found: f"<code>{found[0].strip('`')}</code>", text)
        yield f'<tr id="{name}{option.flag[1:]}"><td><code>{words}</code></td><td>{text}</td></tr>'


# Notebooks


def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """A notebook as it was run: name → page, and its pictures."""
    page = f"notebooks/{path.stem}.md"
    made: dict[str, str | bytes] = {}
    parts = []
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                picture = f"{path.stem}_{number}.png"
                made[f"notebooks/{picture}"] = b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above draws]({picture})")
            elif "text/html" in data:
                parts.append(f'<div class="output">{"".join(data["text/html"])}</div>')
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    link = f'<a href="../{path.name}" download>{path.name}</a>'
    parts.insert(1, f"*This page is the notebook {link}, as it was run.*")
    return made | {page: "\n\n".join(parts)}


# How to cite


def cite_page() -> str:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    entries = [bibtex("blockdiff", "software", found)]
    entries += [
        bibtex(str(one["authors"][0]["family-names"]).lower() + str(one["year"]), one["type"], one)
        for one in found["references"]
    ]
    return (
        f"# How to cite\n\n{found['message']}\n\n```bibtex\n"
        + "\n\n".join(entries)
        + "\n```\n\nThe same stands in the repository's `CITATION.cff`.\n"
    )


def bibtex(key: str, kind: str, work: dict[str, object]) -> str:
    authors = " and ".join(
        f"{one['family-names']}, {one['given-names']}" if "family-names" in one else one["name"]
        for one in work["authors"]
    )
    fields = {"title": f"{{{work['title']}}}", "author": authors}
    if "collection-title" in work:
        fields["booktitle"] = work["collection-title"]
    for name in ("year", "version", "url"):
        if name in work:
            fields[name] = work[name]
    kind = {"conference-paper": "inproceedings", "software": "software"}.get(kind, "misc")
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}}}"
