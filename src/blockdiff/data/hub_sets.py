"""Whether the Hugging Face hub answers, asked once and not for long.

The hub's clients ask one that cannot be reached six times, 23 seconds for every data set. Here it
is asked once about a data set; when it does not answer, the libraries are put into their offline
mode, in which they read the copies on this machine and fail at once where there is none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread
from urllib.parse import quote

from blockdiff.errors import InputError, first_line

PATIENCE = 4.0  # seconds
_fault: str | None = None  # why the hub is left alone


class HubUnreachable(InputError):
    """A data set that is not on this machine, and no hub to ask; `reason` does not name it."""

    def __init__(self, name: str, subset: str | None, split: str, fault: str) -> None:
        self.reason = (
            f"the Hugging Face hub cannot be reached ({fault}), and no copy is on this machine"
        )
        super().__init__(
            f"{name!r} is no local file, {self.reason} (subset {subset!r}, split {split!r}); check "
            "the name and the network"
        )


@contextmanager
def hub_or_copies(data: str) -> Iterator[str | None]:
    """Inside, copies on this machine are all that is read if the hub does not answer about `data`.

    Gives why it does not, or None. Inside another that got no answer it is not asked again.

    Args:
        data: id of a data set, maybe with @revision.
    """
    import datasets
    from huggingface_hub import constants

    global _fault
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        yield _fault or "offline mode is on"
        return
    fault = _ask(data)
    if fault is None:
        yield None
        return
    _fault = fault
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield fault
    finally:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
        _fault = None


def _ask(data: str) -> str | None:
    from huggingface_hub import constants, get_session

    where, _, revision = data.partition("@")
    url = f"{constants.ENDPOINT}/datasets/{where}/resolve/{quote(revision or 'main', safe='')}"
    found: list[str | None] = []

    def ask() -> None:
        try:
            answer = get_session().head(
                f"{url}/README.md", timeout=PATIENCE, follow_redirects=False
            )
        except Exception as error:  # whatever the transport, a proxy or a certificate raises
            found.append(first_line(error))
        else:
            # That a data set is not there, or not for everyone, is an answer too.
            code = answer.status_code
            found.append(f"it answers with status {code}" if code >= 500 else None)

    # No timeout of the client covers looking the name up.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else f"no answer within {PATIENCE:g} s"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps what `datasets` and the hub's client log off stderr, and their bars on a terminal."""
    import datasets
    import huggingface_hub.utils as hub

    with ExitStack() as after:
        for log in (datasets.logging, hub.logging):
            after.callback(log.set_verbosity, log.get_verbosity())
            log.set_verbosity_error()
        for bars in (datasets.utils, hub):
            if not sys.stderr.isatty() and not bars.are_progress_bars_disabled():
                bars.disable_progress_bars()
                after.callback(bars.enable_progress_bars)
        yield
