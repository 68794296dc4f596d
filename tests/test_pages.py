"""The pages: the site builds without network, links lead somewhere, examples are run or read.

Every fenced block of `bash` or `python` in README.md, CONTRIBUTING.md, docs/ and the starter's card
is run by a test, this one or one that is named below; or its page stands in `NOT_RUN` with the
reason, and then its commands are still read by the real command line.
"""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from html import unescape
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import blockdiff
from blockdiff import cli
from blockdiff.cli import parse
from blockdiff.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "src/blockdiff/**/README.md")
    for path in ROOT.glob(pattern)
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

# Page and language → the test that runs its blocks as they stand.
RUN_BY = {
    ("README.md", "bash"): "test_readme.py::test_readme_runs",
    ("README.md", "python"): "test_readme.py::test_readme_runs",
    ("docs/extending.md", "python"): "test_plugins.py::test_the_page_is_run_as_it_stands",
    ("docs/extending.md", "bash"): "test_plugins.py::test_the_page_is_run_as_it_stands",
    ("docs/transformers.md", "python"): "test_transformers.py::test_the_page_runs_as_it_stands",
}
# Pages with commands that no test runs, and why. What begins with the packaged starter is run even
# there, and so is what stands in the README in the same words.
NOT_RUN = {
    "CONTRIBUTING.md": "the test suite itself, and installing",
    "docs/adaptation.md": "a model of the hub; tests/adapted runs the same on small ones",
    "docs/chat.md": "a model of the hub; tests/test_chat.py runs the same with the starter",
    "docs/decoding.md": "trained models; test_drafting.py and test_tune.py have small ones",
    "docs/evaluation.md": "installs, or wants LAMBADA; tests/test_harness.py runs lm_eval",
    "docs/recipes.md": "weeks of GPUs; tests/test_recipes.py runs each for two steps",
    "docs/released.md": "a trained model; tests/test_released.py exports one",
    "docs/reproduction/README.md": "two hours; tests/test_reproduction.py runs --smoke",
    "docs/serving.md": "servers are started by tests/serving",
    "docs/start.md": "installs",
    "docs/training.md": "hours, and corpora that are not here; tests/training has small ones",
    "docs/transformers.md": "a trained model; tests/test_transformers.py has a small one",
}
# The same of Python: such blocks are compiled, and what they import is there.
PYTHON_NOT_RUN = {"docs/serving.md": "starts servers that do not end; tests/serving starts others"}
# Commands that are not ours and that nothing here checks.
OTHERS = {"echo", "printf", "mv", "export", "curl", "docker", "podman", "systemctl"}
# Commands that are run on the starter, and what is appended: the same thing, small.
RUN_HERE: dict[str, list[str]] = {"generate": ["--max-new-tokens", "4"], "infill": [], "score": []}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    found = [(lang, body) for _, lang, body in fence.findall(page.read_text("utf-8"))]
    return [(lang, body) for lang, body in found if not languages or lang in languages]


def lines_of(script: str) -> list[str]:
    """A shell script's commands, a line each; comment lines and variables before them left out."""
    lines = (line.strip() for line in script.replace("\\\n", " ").splitlines())
    lines = (re.sub(r"^(\w+=\S*(\s+|$))+", "", line) for line in lines)
    return [line for line in lines if line and not line.startswith("#")]


README_LINES = {line for _, body in blocks(ROOT / "README.md", "bash") for line in lines_of(body)}


def is_run_here(line: str) -> bool:
    """What needs nothing but the package: commands on the starter that write or measure."""
    words = shlex.split(line, comments=True)
    ours = words[0] == "blockdiff" and words[1] in RUN_HERE and "starter" in words[2:3]
    return ours and not {"|", "<", ">", "--prompt-file", "--file"} & set(words)


def own_words(line: str) -> Iterator[list[str]]:
    """The words behind each `blockdiff` of a line; fails for a command nobody knows."""
    for before, part in re.findall(r"(?:^|(?<= )(&&|[|<>]) )(.+?)(?= (?:&&|[|<>]) |$)", line):
        words = shlex.split(part, comments=True)
        if before in ("<", ">"):
            continue  # a file
        if words[0] == "blockdiff":
            yield words[1:]
        elif "-m" in words and words[words.index("-m") + 1] == "blockdiff":
            yield words[words.index("-m") + 2 :]
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or "-m" in words, line
        elif words[0] == "make":
            target = rf"^{words[1]}:" if len(words) > 1 else "^all:"
            assert re.search(target, (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), line
        elif words[:2] == ["pip", "install"]:
            extras = re.findall(r"(?:blockdiff|\.)\[([\w,]+)\]", line)
            assert {x for one in extras for x in one.split(",")} <= set(
                PROJECT["optional-dependencies"]
            ), line
        elif words[0] in ("lm_eval", "mkdocs"):
            assert words[1] in ("--model", "build", "serve"), line
        else:
            assert words[0] in OTHERS, f"{line}: what is {words[0]}?"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_example_is_run_or_listed(page: Path) -> None:
    for language, body in blocks(page, "bash", "python"):
        key = name_of(page), language
        if key in RUN_BY or (language == "python" and page in PYTHON_HERE):
            continue
        if language == "python" and key[0] in PYTHON_NOT_RUN:
            tree = ast.parse(body)
            imports = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), str(page), "exec"), {})
            continue
        assert language == "bash", f"{key}: no test runs\n{body}"
        lines = [x for x in lines_of(body) if x not in README_LINES and not is_run_here(x)]
        assert not lines or key[0] in NOT_RUN, f"{key}: no test runs\n{lines}"


def test_what_is_listed_is_there() -> None:
    names = {name_of(page) for page in PAGES}
    assert set(NOT_RUN) | set(PYTHON_NOT_RUN) <= names and {page for page, _ in RUN_BY} <= names
    for (page, language), test in RUN_BY.items():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8")
        assert blocks(ROOT / page, language), f"{page} has no {language}"
    for page in set(NOT_RUN) - {"docs/serving.md"}:
        assert blocks(ROOT / page, "bash"), f"{page} has no command"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_ones_there_are(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of options and their kinds, in blocks of the shell and in those without a language."""
    monkeypatch.chdir(ROOT)  # where recipes are found
    for language, body in blocks(page, "bash", ""):
        if language == "bash":
            done = subprocess.run(["bash", "-n"], input=body, text=True, capture_output=True)
            assert not done.returncode, done.stderr
        script = body.startswith("#!")
        for line in lines_of(body):
            if (script or not language) and "blockdiff " not in line:
                continue
            if not language and not line.startswith("blockdiff "):
                continue
            for words in own_words(line.replace("$resume", "--resume")):
                if "--plugin" in words or "--help" in words or not words:
                    continue
                name, given = parse(words)
                for kind in COMMANDS[name].kinds:
                    given.make(kind)


PYTHON_HERE = [ROOT / "docs/start.md", ROOT / "docs/decoding.md",
               ROOT / "src/blockdiff/starter/README.md"]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_starters_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    schema = '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'
    Path("person.json").write_text(schema)
    for _, body in blocks(page, "bash"):
        for line in lines_of(body):
            if is_run_here(line) and line not in README_LINES:
                words = shlex.split(line, comments=True)[1:]
                cli.main([*words, *RUN_HERE[words[0]]])
                assert capsys.readouterr().out, line
    if page in PYTHON_HERE:
        model, tokenizer = blockdiff.load("starter")
        names = {"blockdiff": blockdiff, "model": model, "tokenizer": tokenizer}
        for _, body in blocks(page, "python"):
            exec(compile(body, str(page), "exec"), names)
        assert capsys.readouterr().out


# Links


def without_code(text: str) -> str:
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(
        r"`[^`\n]*`", lambda code: "`" + re.sub(r"[\[\]()]", "", code[0][1:-1]) + "`", text
    )


@cache
def anchors(page: Path) -> set[str]:
    """The names GitHub gives to a page's headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*?)\s*$", without_code(page.read_text("utf-8")), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = base = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        number = 0
        while slug in found:
            number += 1
            slug = f"{base}-{number}"
        found.add(slug)
    return found


def local(page: Path, target: str) -> Path | None:
    """The file a link of a page leads to; None for one that leads elsewhere."""
    if url := PROJECT.get("urls", {}).get("Repository"):
        raw = url.replace("//github.com/", "//raw.githubusercontent.com/")
        found = re.match(rf"(?:{re.escape(url)}/(?:blob|tree)|{re.escape(raw)})/\w+/(.*)", target)
        if found:
            return ROOT / found[1]
    return None if re.match(r"\w+:", target) else page.parent / target if target else page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
        target, _, anchor = unquote("".join(link)).partition("#")
        place = local(page, target)
        if place is None:
            continue
        assert place.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(place.resolve()), f"{link}: no such heading"


# The site

# As `mkdocs`, in a process that cannot open a connection.
OFFLINE = """
import socket, sys
def refuse(*_, **__): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = ["build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_asks_nobody(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    loads = re.compile(
        r"""<(?:script|img|iframe|source|video)[^>]+src=["']?(?:https?:)?//[^>]*>"""
        r"""|<link(?![^>]*rel=["']?(?:canonical|prev|next))[^>]+href=["']?(?:https?:)?//[^>]*>"""
        r"""|@import|url\(["']?(?:https?:)?//"""
    )
    for file in [*pages, *site.rglob("*.css")]:
        found = loads.search(file.read_text("utf-8"))
        assert found is None, f"{file.relative_to(site)}: {found and found[0]}"
    for outside in ("<script src=https://a.b/c>", "<link rel=stylesheet href='//a/b'>"):
        assert loads.search(outside), "the pattern sees what it should"
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_the_site_has_every_option_and_every_public_name(site: Path) -> None:
    options = (site / "options" / "index.html").read_text("utf-8")
    shown = " ".join(unescape(re.sub(r"<[^>]+>", "", options)).split())
    for name, command in COMMANDS.items():
        assert f'id="{name}"' in options and command.summary in shown
        for option in command.options.values():
            assert f'id="{name}{option.flag[1:]}"' in options
            assert " ".join((option.help or "").replace("`", "").split()) in shown, (
                name,
                option.name,
            )
    api = (site / "api" / "index.html").read_text("utf-8")
    for name in blockdiff.__all__:
        assert f'id="blockdiff.{name}"' in api or f"<code>{name}</code>" in api, name
    assert "&gt;&gt;&gt; " not in re.sub(r"<pre>.*?</pre>", "", api, flags=re.DOTALL), (
        "examples are code"
    )


def test_the_site_shows_the_notebooks_as_they_ran(site: Path) -> None:
    for path in ROOT.glob("docs/notebooks/*.ipynb"):
        page = (site / "notebooks" / path.stem / "index.html").read_text("utf-8")
        pictures = re.findall(rf'src="\.\./({path.stem}_\d+\.png)"', page)
        assert pictures and all((site / "notebooks" / one).is_file() for one in pictures)
        assert "nats a token" in page


# What pages say


def test_the_glossarys_places_exist() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    names = re.findall(
        r"`([\w.]+)`", "\n".join(x.split("|")[3] for x in text.splitlines() if x.count("|") == 4)
    )
    assert len(names) > 40
    for name in names:
        if name in ("x_0", "mask_token_id", "length", "clean_stream", "prediction"):
            continue
        try:
            import_module(f"blockdiff.{name}")
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(f"blockdiff.{module}"), attribute), name
    for word in ("x_0", "x_t", "α_t", "σ", "block_size", "nfe", "TPF", "clean stream", "draft"):
        assert word in text


def test_the_citation_is_whole() -> None:
    """What the format 1.2.0 requires, and this version."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["message"] and found["title"] and found["license"] == PROJECT["license"]
    assert found["version"] == PROJECT["version"] == blockdiff.__version__
    assert found["repository-code"] == PROJECT.get("urls", {}).get(
        "Repository", found["repository-code"]
    )
    paper = found["references"][0]
    assert paper["type"] == "conference-paper" and paper["year"] == 2025
    for author in [*found["authors"], *paper["authors"]]:
        assert set(author) in ({"name"}, {"family-names", "given-names"})
    assert paper["url"] in (ROOT / "README.md").read_text("utf-8")
