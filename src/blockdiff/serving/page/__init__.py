"""The page at `/`: what the server writes, shown while it appears out of masks.

It is sent as one document with its style and script in it. The Content-Security-Policy names both
by their hashes and lets it speak with this server alone, so text can never run as a script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import lru_cache
from importlib.resources import files
from typing import Any, get_args

from starlette.responses import HTMLResponse

from blockdiff.registry import ORDERS, SCHEDULES
from blockdiff.sampling.options import REAL_NUMBERS, WHOLE_NUMBERS, Drafter, Remasking


def page_response() -> HTMLResponse:
    """The page, as a browser wants it; it holds nothing that a key would have to guard."""
    content, policy = _page(json.dumps(_orders()))
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(content, headers=headers)


def _orders() -> dict[str, Any]:
    """What the orders there are can be told, plugins' included: a number, or one of some names."""
    names = {
        "remasking": get_args(Remasking),
        "drafter": get_args(Drafter),
        "schedule": list(SCHEDULES),
    }
    known = [*WHOLE_NUMBERS, *REAL_NUMBERS, *names]
    reads = {name: [s for s in ORDERS.words("reads", name) if s in known] for name in ORDERS}
    return {"reads": reads, "names": names}


@lru_cache(maxsize=1)
def _page(orders: str) -> tuple[str, str]:
    """The document and the policy that goes with it."""
    own, shared = files("blockdiff") / "serving" / "page", files("blockdiff") / "templates"

    def read(*parts: Any) -> str:
        return "".join(part.read_text("utf-8") for part in parts)

    values = {
        "style": read(shared / "denoising.css", own / "page.css"),
        "script": read(own / "run.js", own / "column.js", own / "form.js", own / "page.js"),
        "orders": orders.replace("<", "\\u003c"),
    }
    content = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], read(own / "page.html"))
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src {_hash(values['script'])}; "
        f"style-src {_hash(values['style'])}; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return content, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
