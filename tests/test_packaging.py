"""What is shipped: both distributions, their metadata, and the examples of how to run them."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from blockdiff.cli import parse

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What a build or a run leaves in a checkout.
LEFT = (
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache",
    ".hypothesis", ".schemathesis",
)  # fmt: skip


def names(lines: list[str]) -> set[str]:
    """Distributions that these requirements name, those of our own extras in their place."""
    found = set()
    for one in map(Requirement, lines):
        if one.name == "blockdiff":
            found |= {name for extra in one.extras for name in names(EXTRAS[extra])}
        else:
            found.add(canonicalize_name(one.name))
    return found


def imported(path: Path) -> set[str]:
    """Top names of what a file imports anywhere, by statement."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"blockdiff"}


def distribution(module: str) -> str:
    """What installs it, which mostly has its name."""
    return {"yaml": "pyyaml", "mauve": "mauve-text"}.get(module) or canonicalize_name(module)


# Where a module beyond the core may be imported: its extra's own rooms.
ROOMS = {
    "adapt": ("blockdiff/models/lora.py",),
    "eval": ("blockdiff/evaluation/harness.py", "lm_eval_blockdiff.py"),
    "ray": ("blockdiff/commands/batch.py", "blockdiff/jobs/", "blockdiff/serving/"),
    "serve": ("blockdiff/serving/",),
    # Comes with transformers, torch or the extra's own packages, and is their interface.
    "serve's": ("blockdiff/serving/",),
}
BEHIND = {"serve's": {"starlette", "pydantic"}}


def test_the_core_names_what_it_imports_and_extras_stay_in_their_rooms() -> None:
    core = names(PROJECT["dependencies"])
    used = set()
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE).as_posix()
        here = {extra for extra, rooms in ROOMS.items() if place.startswith(rooms)}
        allowed = core.union(*(BEHIND.get(extra) or names(EXTRAS[extra]) for extra in here))
        for module in imported(path):
            assert distribution(module) in allowed, f"{place} imports {module}"
            used.add(distribution(module))
    # tensorboard is imported by torch, where a run is logged; jinja2 by transformers, for chats.
    assert core - used <= {"tensorboard", "jinja2"}


def test_dev_holds_every_extra() -> None:
    for extra in set(EXTRAS) - {"dev", "wandb"}:
        assert names(EXTRAS[extra]) <= names(EXTRAS["dev"]), extra
    assert names(EXTRAS["lora"]) == names(EXTRAS["adapt"]) == {"peft"}
    assert {"adapt", "serve", "eval", "ray", "docs", "constrain", "wandb"} <= set(EXTRAS)


def test_constraints_pin_all_that_dev_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
    assert lines == sorted(lines, key=str.lower)
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    left, seen = [*PROJECT["dependencies"], *EXTRAS["dev"]], set()
    while left:
        line = left.pop()
        one = Requirement(line)
        if one.name == "blockdiff":
            left += [line for extra in one.extras for line in EXTRAS[extra]]
        elif line not in seen and any(
            one.marker is None or one.marker.evaluate({"extra": extra})
            for extra in (*one.extras, "")
        ):
            seen.add(line)
            try:
                deeper = requires(one.name) or []
            except PackageNotFoundError:  # of another system, or of an extra that is not here
                continue
            assert canonicalize_name(one.name) in pinned, line
            extras = [*one.extras, ""]
            left += [
                str(sub).partition(";")[0] for sub in map(Requirement, deeper)
                if sub.marker is None or any(sub.marker.evaluate({"extra": e}) for e in extras)
            ]  # fmt: skip
    assert len(seen) > 80


# README, as PyPI shows it


REPOSITORY = PROJECT["urls"]["Repository"]
FILES = f"{REPOSITORY}/blob/main/"
RAW = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"


def links(text: str) -> tuple[dict[str, str], list[tuple[bool, str, str]]]:
    """(name → address below the text, (is an image, words, name or address) of each link)."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    named = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.M))
    text = re.sub(r"`[^`]*`", "", re.sub(r"^\[([^\]]+)\]: (\S+)$", "", text, flags=re.M))
    found = re.findall(r"(!?)\[([^\]]+)\](?:\(\s*([^)]+?)\s*\)|\[([^\]]*)\])?", text)
    return named, [
        (bool(mark), words, address or name or words) for mark, words, address, name in found
    ]


def test_every_link_of_the_readme_is_absolute_and_leads_somewhere() -> None:
    named, found = links((ROOT / "README.md").read_text("utf-8"))
    assert len(found) > 15 and sum(image for image, *_ in found) == 1
    used = {to for _, _, to in found}
    assert set(named) <= used, "a link nobody follows"
    for image, words, to in found:
        to = named.get(to, to)
        assert to.startswith("https://"), f"[{words}] leads to {to}: give it an address below"
        place = to.removeprefix(RAW if image else FILES).partition("#")[0]
        if to.startswith(REPOSITORY.partition("/blockdiff")[0]) or image:
            assert place != to and (ROOT / place).is_file(), to
        if "#" in to and place.endswith(".md"):
            titles = re.findall(r"^#+ (.*)$", (ROOT / place).read_text("utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}
            assert to.partition("#")[2] in anchors, to


def test_the_reading_of_links_sees_what_it_should() -> None:
    text = "[a](docs/a.md) ![b][p] [c] `[no](x)`\n```\n[no](y)\n```\n[p]: https://p\n[c]: https://c"
    assert links(text) == (
        {"p": "https://p", "c": "https://c"},
        [(False, "a", "docs/a.md"), (True, "b", "p"), (False, "c", "c")],
    )


def test_the_project_says_where_it_is_and_what_it_is_for() -> None:
    for name in ("Homepage", "Documentation", "Repository", "Issues", "Changelog"):
        assert PROJECT["urls"][name].startswith(REPOSITORY) or name == "Documentation"
    assert len(PROJECT["keywords"]) > 5
    versions = [one for one in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", one)]
    least = PROJECT["requires-python"].removeprefix(">=")
    assert versions[0].endswith(f":: {least}") and len(versions) >= 3


# the distributions


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], Path]:
    """(files of a clean checkout, those of the sdist, the wheel that is built from it)."""
    clean, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    kept = shutil.ignore_patterns(*LEFT)
    shutil.copytree(ROOT, clean, ignore=kept, symlinks=True, dirs_exist_ok=True)
    build(clean, "sdist", out)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    shipped = files(folder)
    build(folder, "wheel", out)
    (wheel,) = out.glob("*.whl")
    return files(clean), shipped, wheel


def build(folder: Path, what: str, out: Path) -> None:
    """By the backend itself, as `python -m build --no-isolation` asks it."""
    code = f"from setuptools.build_meta import build_{what} as b; print(b({str(out)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def files(folder: Path) -> set[str]:
    """Those below a folder, and behind the links in it, that no build has left."""
    found = {
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, inside in os.walk(folder, followlinks=True) for name in inside
    }  # fmt: skip
    return {name for name in found if ".egg-info" not in name}


def test_the_sdist_is_the_checkout(built: tuple[set[str], set[str], Path]) -> None:
    checkout, shipped, _ = built
    assert checkout - shipped == set()
    assert shipped - checkout <= {"PKG-INFO", "setup.cfg"}  # an sdist's own sdist adds nothing
    for name in (
        "tests/conftest.py",
        "recipes/owt/bd3lm-4.yaml",
        "docs/theory.md",
        "Makefile",
        "benchmarks/gpu.py",
        "constraints.txt",
        ".ci/run",
        "deploy/Containerfile",
    ):
        assert name in shipped  # fmt: skip


def test_the_wheel_holds_the_package_and_nothing_else(
    built: tuple[set[str], set[str], Path],
) -> None:
    checkout, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {name.removeprefix("src/") for name in checkout if name.startswith("src/")}
    assert inside == package, "every file of the package, data too"
    for name in (
        "py.typed",
        "starter/model.safetensors",
        "starter/README.md",
        "templates/denoising.html",
        "recipes/owt/bd3lm-4.yaml",
        "recipes/accelerate/fsdp2.yaml",
        "recipes/lm_eval/passages.py",
    ):
        assert f"blockdiff/{name}" in inside  # fmt: skip


def test_what_the_wheel_installs_finds_its_recipes(
    built: tuple[set[str], set[str], Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(built[2]) as archive:
        archive.extractall(tmp_path / "installed")
        (folder,) = (tmp_path / "installed").glob("*.dist-info")
    code = (
        "import json, blockdiff; from blockdiff.cli import parse; "
        "from blockdiff.starter import packaged; "
        "from blockdiff.training.config import TrainConfig; "
        "config = parse(['train', '--config', 'owt/bd3lm-4'])[1].make(TrainConfig); "
        "print(json.dumps([blockdiff.__file__, config.steps, (packaged('starter') / "
        "'model.safetensors').stat().st_size]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    )  # fmt: skip
    where, steps, size = json.loads(run.stdout)
    assert where == str(tmp_path / "installed" / "blockdiff" / "__init__.py")
    assert (steps, size > 10**6) == (150_000, True)
    metadata = (folder / "METADATA").read_text("utf-8")
    assert f"Project-URL: Repository, {REPOSITORY}" in metadata
    assert metadata.count("Provides-Extra: ") == len(EXTRAS) and "[docs/theory.md]" in metadata


# deploy/ and the Makefile


def is_command(words: list[str]) -> None:
    """Words behind `blockdiff` that mean something, every option known."""
    from blockdiff.commands import COMMANDS

    name, given = parse(words)
    given.make(COMMANDS[name].kinds[0])


UNIT = ROOT / "deploy" / "blockdiff.service"


def test_the_unit_starts_the_server_and_lets_it_drain(tmp_path: Path) -> None:
    text = UNIT.read_text("utf-8")
    (words,) = re.findall(r"^ExecStart=/opt/blockdiff/bin/blockdiff (.*)$", text, re.M)
    is_command(words.split())
    (drain,) = re.findall(r"--drain (\d+)", words)
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert int(stop) > int(drain), "systemd would kill texts that may still finish"
    assert "DynamicUser=yes" in text and "KillSignal=SIGTERM" in text
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd")
    # What it starts has to be there, which /opt/blockdiff is not.
    here = tmp_path / UNIT.name
    here.write_text(text.replace("/opt/blockdiff/bin/blockdiff", sys.executable))
    run = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
    asked = ["systemd-analyze", "security", "--offline=true", "--threshold=20", here]
    run = subprocess.run(asked, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-200:]


def test_a_unit_with_a_mistake_is_refused(tmp_path: Path) -> None:
    """The check above can fail."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd")
    here = tmp_path / UNIT.name
    text = UNIT.read_text("utf-8").replace("/opt/blockdiff/bin/blockdiff", sys.executable)
    here.write_text(text.replace("ProtectClock=yes", "ProtectClocks=yes"))
    run = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True)
    assert "ProtectClocks" in run.stdout + run.stderr


def instructions() -> list[tuple[str, str]]:
    """(instruction, what it is given) of the container file."""
    text = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line]


def test_the_container_file_is_well_formed() -> None:
    """It was not built here: every instruction is read, and what it names looked up."""
    found = instructions()
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL",
             "HEALTHCHECK", "ENTRYPOINT", "CMD"}  # fmt: skip
    assert {name for name, _ in found} <= known and found[0][0] == "ARG"
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name, given in found:
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", given]).returncode == 0
        if name == "COPY" and "--from" not in given:
            for source in given.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored
    last = len(found) - [name for name, _ in found][::-1].index("FROM")
    end = dict(found[last:])
    assert end["USER"] not in ("root", "0"), "no instruction after it goes back"
    entry, more = json.loads(end["ENTRYPOINT"]), json.loads(end["CMD"])
    assert entry[0] == "blockdiff" and more == ["starter"]
    is_command([*entry[1:], *more])
    (installs,) = re.findall(r"pip install -c constraints.txt '\.\[(\w+)\]'", str(found))
    assert installs in EXTRAS and end["EXPOSE"] == "8000"


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_the_containers_health_is_the_servers(status: int | None, code: int) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    port = server.server_port
    if status is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    check = dict(instructions())["HEALTHCHECK"]
    words = json.loads(check[check.index("CMD ") + 4 :])
    asked = [sys.executable, "-I", *(word.replace(":8000/", f":{port}/") for word in words[1:])]
    run = subprocess.run(asked, capture_output=True)
    assert words[0] == "python" and run.returncode == code
    if status is not None:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("target", "extra", "command"),
    [("demo", "", "blockdiff"), ("serve", "serve", "blockdiff"), ("docs", "dev", "mkdocs"),
     ("test", "dev", "pytest")],
)  # fmt: skip
def test_make_installs_what_a_target_needs_and_runs_it(
    target: str, extra: str, command: str, tmp_path: Path
) -> None:
    run = subprocess.run(
        ["make", "--no-print-directory", "-n", target, f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    (install,) = (line for line in run.stdout.splitlines() if "pip install" in line)
    assert install.endswith(f"-e '.[{extra}]'" if extra else "-e .")
    words = shlex.split(run.stdout.splitlines()[-1])
    assert command in {Path(word).name for word in words}
    if command == "blockdiff":
        is_command(words[1:])


# the suite without extras


def test_a_test_that_needs_an_extra_is_skipped_without_it() -> None:
    """Each import of an extra's module in tests/ stands behind `pytest.importorskip` of it.

    pytest, scipy and what comes with them are the suite's own needs.
    """
    extras = set(EXTRAS) - {"dev"}
    optional = set().union(*(names(EXTRAS[extra]) for extra in extras))
    optional |= {"openai", "schemathesis", "playwright", "nbclient", "ipykernel", "starlette"}
    optional -= names(PROJECT["dependencies"])
    seen = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text("utf-8")
        for module in imported(path):
            if distribution(module) in optional:
                skip = re.search(rf"importorskip\(\s*\"{module}[\".]", text)
                uses = re.search(rf"^ *(import|from) {module}\b", text, re.M)
                assert skip and uses and skip.start() < uses.start(), f"{path.name}: {module}"
                seen.add(module)
    assert {"lm_eval", "peft"} <= seen
