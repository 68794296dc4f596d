"""What run.json tells beside the options: where, when and from what a run was trained."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from blockdiff.errors import InputError
from blockdiff.plugins import loaded_plugins
from blockdiff.training.config import TrainConfig

# In the place of a fingerprint: a stream is never read to its end.
UNKNOWN = "a stream has no fingerprint"


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
            "blockdiff": version("blockdiff"),
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


def fingerprint(windows: object) -> str:
    """A hash of text, tokenizer and packing; of a stream, words that say there is none."""
    return str(getattr(windows, "key", UNKNOWN))


def check_data(config: TrainConfig, record: dict[str, Any], data: dict[str, str]) -> None:
    """Raises `InputError` when the run began with another text than `data`, its fingerprints."""
    for part, what in (("train", "text"), ("validation", "text to validate on")):
        known = record.get("data", {}).get(part)
        if known is not None and known != data[part]:
            source = config.data if part == "train" else config.validation_data or config.data
            raise InputError(
                f"the {what} in {source} is not what the run in {config.out} began with; put the "
                "old one back, or begin another run in another `out`"
            )
