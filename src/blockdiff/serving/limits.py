"""What a server takes, and how long it works on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    `prompt_tokens`: None for what the model's context has room for. `new_tokens`: of one choice.
    `choices`: of one request. `body_bytes`: of one request; `body_seconds`: to send it. `seconds`:
    of one request, from its arrival. `drain_seconds`: what runs has to finish in after SIGTERM.
    `origins`: whose pages may call from a browser.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 4096
    choices: int = 128
    body_bytes: int = 2**20
    body_seconds: float = 30.0
    seconds: float = 300.0
    drain_seconds: float = 30.0
    api_key: str | None = None
    origins: tuple[str, ...] = ()
