"""What run.json tells beside the options: where, when and from what a run was trained."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from blockdiff import folders
from blockdiff.attention import choose_backend
from blockdiff.outputs import staging
from blockdiff.plugins import loaded_plugins
from blockdiff.training.config import TrainConfig
from blockdiff.training.data import TrainingData
from blockdiff.training.stored import save_config
from blockdiff.version import VERSION


def session(device: torch.device) -> dict[str, Any]:
    """Of one process that trains: start (UTC), command, device, plugins, versions and commit."""
    name = device.type
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    elif device.type == "cpu":
        name = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "device": name,
        "plugins": loaded_plugins(),
        "versions": {
            "blockdiff": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit() or None,
    }


def commit() -> str:
    """The commit of the code that runs, "+" behind it if it was changed since.

    Empty where the package is no part of a git working copy, installed for example.
    """
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str:
        # No lock on the index: a run killed in this moment would leave it behind.
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment may lie in somebody else's repository, untracked.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def begin(
    config: TrainConfig,
    data: TrainingData,
    device: torch.device,
    record: dict[str, Any],
    head_dim: int,
) -> dict[str, Any]:
    """Puts run.json and the tokenizer into the folder, for which an earlier run makes room.

    `head_dim`: of the network's keys, which decides what "auto" stands for among the backends.
    Returns the run's record: that of its start, and under `resumed` those of later sessions.
    """
    out = Path(config.out)
    now = session(device)
    if config.resume and "started" in record:
        record = {name: value for name, value in record.items() if name != "finished"}
        record["resumed"] = [*record.get("resumed", []), now]
    else:
        backend = choose_backend(config.backend, device, head_dim)
        became = {"precision": config.precision, "backend": backend}
        record = {**now, "resolved": became, "data": data.fingerprints}
        record |= {"conversations": data.conversations} if data.conversations else {}
    if not config.resume:
        folders.clear(out)
    save_config(config, out, record)
    if not (out / "tokenizer_config.json").is_file():
        with staging(out) as temporary:
            data.tokenizer.save_pretrained(temporary)
    return record
