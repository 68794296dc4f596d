"""What goes wrong with a server's clients, its requests and its own end, shown on a real process.

    python benchmarks/serving_faults.py            100 clients that go away, bodies of 100 MB, …
    python benchmarks/serving_faults.py --smoke    a few of each

Beside each fault two clients ask for greedy texts, over and over; each has to be the one that
`blockdiff.generate` writes alone. After it the server's rows and queue have to be empty, and an
ordinary request answered. benchmarks/results/serving_faults.json tells what was sent, how it was
answered, seconds until the rows were free, texts compared, and memory. Exits 1 where anything else
came out. The tests run the smoke sample.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import blockdiff
from serving_clients import (
    LONG,
    NEW,
    PATIENCE,
    Known,
    Launch,
    Server,
    ask,
    body,
    company,
    launched,
    reset,
    status_of,
    together,
)

RESULT = Path(__file__).parent / "results" / "serving_faults.json"
PLUGIN = """
import torch, blockdiff

class Raises(blockdiff.Order):
    name = "poison_raises"
    def choose(self, logits, wanted, rows):
        first = wanted & (wanted.cumsum(1) == 1)
        if (rows.evaluations >= 2).any():
            self.wrong(logits)
        return torch.from_numpy(first[wanted]), rows.draw(self.made(logits, rows), wanted)
    def wrong(self, logits):
        raise RuntimeError("a secret of the plugin in /etc/secret")
    def made(self, logits, rows):
        return logits

class NotANumber(Raises):
    name = "poison_nan"
    def wrong(self, logits):
        pass
    def made(self, logits, rows):
        return logits * torch.nan if (rows.evaluations >= 2).any() else logits

class NoToken(NotANumber):
    name = "poison_no_token"
    def choose(self, logits, wanted, rows):
        chosen, tokens = super().choose(logits.nan_to_num(0.0), wanted, rows)
        return chosen, tokens - 10**9 * int((rows.evaluations >= 2).any())
    def made(self, logits, rows):
        return logits

for one in (Raises, NotANumber, NoToken):
    blockdiff.register_order(one())
"""
POISONS = ("poison_raises", "poison_nan", "poison_no_token")


# What is sent


def head(length: int | None, *lines: bytes, path: bytes = b"/v1/completions") -> bytes:
    size = [] if length is None else [b"Content-Length: %d" % length]
    kind = [b"Content-Type: application/json"]
    return b"\r\n".join(
        [b"POST " + path + b" HTTP/1.1", b"Host: a", *kind, *size, *lines, b"", b""]
    )


CHUNKED = head(None, b"Transfer-Encoding: chunked")


def written(wish: dict[str, Any]) -> bytes:
    data = json.dumps(wish).encode()
    return head(len(data)) + data


# The faults: each gives what was sent and how many were answered how


def vanish(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Half of them abruptly, half in order, each as soon as its text has begun."""
    count, before = 10 if smoke else 100, server.metric("rows_cancelled_total")

    def client(number: int) -> str:
        link = server.raw()
        link.sendall(written(body(number, LONG, stream=True)))
        while b"data: " not in (part := link.recv(4096)):
            if not part:
                return "no text"
        if number % 2:
            reset(link)
            return "gone by RST"
        link.close()
        return "gone by FIN"

    found = together(count, client)
    server.until(
        lambda: server.metric("rows_cancelled_total") - before == count, "the rows' cancellation"
    )
    return f"{count} clients that go away mid-stream", found


def slow(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Readers with a buffer of 2 KB that begin to read when their rows are written."""
    count, choices, new = (1, 4, 2 * NEW) if smoke else (4, 8, LONG)
    before = server.metric("rows_finished_total")
    wishes = [body(i, new, n=choices, logprobs=1, stream=True) for i in range(count)]
    links = [server.raw(2048) for _ in wishes]
    for link, wish in zip(links, wishes, strict=True):
        link.sendall(written(wish))
    rows = count * choices
    server.until(
        lambda: server.metric("rows_finished_total") - before >= rows and server.busy <= 2,
        "the end of rows whose reader sleeps",
    )
    found: Counter[str] = Counter()
    for link, wish in zip(links, wishes, strict=True):
        told = b""
        while not told.endswith(b"0\r\n\r\n") and (part := link.recv(4096)):
            told += part
        link.close()
        texts = [""] * choices
        for one in re.findall(rb"data: (\{.*)\n\n", told):
            (choice,) = json.loads(one)["choices"]
            texts[choice["index"]] += choice["text"]
        done = b"data: [DONE]" in told and server.compare(wish, texts)
        found["whole" if done else "wrong"] += 1
    return f"{count} streams of {choices} texts, read when they are written", found


def half(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Bodies that end before their time, that come byte by byte, that never end."""
    count = 4 if smoke else 20
    data = written(body(1))

    def client(number: int) -> str:
        link = server.raw()
        if number % 4 == 0:  # byte by byte, and whole in the end
            for place in range(len(data)):
                link.sendall(data[place : place + 1])
                time.sleep(0.002)
            return f"byte by byte: {status_of(link)}"
        link.sendall(data[: -20 if number % 4 == 1 else data.index(b"{")])
        time.sleep(0.05)
        if number % 4 == 3:
            reset(link)
            return "half, then RST"
        link.close()
        return "half, then FIN"

    def sleeper(number: int) -> str:
        with server.raw() as link:
            if number % 3 == 0:
                link.sendall(data[:40])
                return f"half a head: {status_of(link)}"
            link.sendall(head(10**6) + b"{")
            if number % 3 == 1:
                return f"never ended: {status_of(link)}"
            until = time.monotonic() + PATIENCE
            with suppress(OSError):
                while time.monotonic() < until:  # whatever the server says
                    link.sendall(b" ")
                    time.sleep(0.1)
                return "fed for ever"
            return "fed until cut off"

    found = together(count, client)
    if not smoke:
        found += together(9, sleeper)
    return f"{found.total()} requests sent in part", found


def large(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Bodies of 100 MB, with their length and in pieces without."""
    count, before = 2 if smoke else 6, server.rss

    def client(number: int) -> str:
        piece = b"x" * 10**6
        with server.raw() as link:
            with suppress(OSError):
                link.sendall(head(100 * 10**6) if number % 2 else CHUNKED)
                for _ in range(100):
                    link.sendall(piece if number % 2 else b"%x\r\n%b\r\n" % (len(piece), piece))
            return f"{'with' if number % 2 else 'without'} a length: {status_of(link)}"

    found = together(count, client)
    server.check(server.rss - before < 50, f"memory grew by {server.rss - before} MB")
    return f"{count} bodies of 100 MB", found


def nested(levels: int) -> Iterator[bytes]:
    """JSON of so many levels: alone, in a field that is not known, in known ones."""
    inner = b"[" * levels + b"]" * levels
    yield from (b"[" * levels, b'{"a":' * levels, inner, inner + b"}")
    for place in (b'"other"', b'"messages"', b'"prompt"', b'"logit_bias"', b'"stop"'):
        yield b'{"max_tokens": 1, %b: %b}' % (place, inner)
    schema = b'{"not":' * levels + b"{}" + b"}" * levels
    yield (
        b'{"prompt": "a", "max_tokens": 1, "response_format": {"type": "json_schema", '
        b'"json_schema": {"name": "deep", "schema": %b}}}' % schema
    )


def posted(server: Server, bodies: list[bytes]) -> Counter[str]:
    """All bodies, to both routes, by four clients."""
    routes = (b"/v1/completions", b"/v1/chat/completions")
    asked = [head(len(one), path=path) + one for one in bodies for path in routes]
    found: list[str] = []
    done = together(4, lambda number: str(found.extend(map(server.sent, asked[number::4]))))
    server.check(done == {"None": 4}, f"a client failed: {dict(done)}")
    return Counter(found)


def text(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """What is no UTF-8, as a body, in a text, in a name."""
    wrong = [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80", b"\xe2\x82"]
    frames = [b"%b", b'{"prompt": "%b"}', b'{"%b": 1}', b'{"model": "%b", "prompt": "a"}']
    bodies = [frame % one for one in wrong for frame in frames]
    bodies += [b'{"prompt": "\\ud800"}', b'{"\\udfff": "a"}', b'{"stop": ["\\ud83d"]}']
    return f"{2 * len(bodies)} bodies that are no UTF-8", posted(server, bodies)


def deep(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Far more levels than Python's stack has room for."""
    bodies = list(nested(100_000))
    return f"{2 * len(bodies)} bodies of 100,000 levels", posted(server, bodies)


def less_deep(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Levels about those that it has room for, and few enough to be meant."""
    levels = (64, 330, 980) if smoke else range(20, 1020, 40)
    bodies = [one for count in levels for one in nested(count)]
    return f"{2 * len(bodies)} bodies of 20 to 1,000 levels", posted(server, bodies)


def numbers(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    names = [
        "max_tokens", "n", "seed", "temperature", "top_p", "top_k", "logprobs", "block_size",
        "steps", "threshold", "margin", "entropy_bound", "repetition_penalty", "cfg_scale",
        "sub_block", "prompt",
    ]  # fmt: skip
    values = [
        "1e308", "1e999", "-1e999", "1e-400", "NaN", str(2**63), str(2**64), str(-(2**63)),
        *("1" + "0" * zeros for zeros in (30, 400, 6000)), "-1" + "0" * 30,
    ]  # fmt: skip
    frames = [f'"{name}": %s' for name in names]
    frames += ['"prompt": [[%s]]', '"logit_bias": {"1": %s}', '"logit_bias": {"%s": 1}']
    start = '{"max_tokens": 1, "prompt": "a", "messages": [{"role": "user", "content": "a"}], '
    bodies = [
        f"{start}{frame % value}}}".encode()
        for frame in frames for value in (values[::4] if smoke else values)
    ]  # fmt: skip
    return f"{2 * len(bodies)} bodies with huge numbers", posted(server, bodies)


def lines(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Heads that are none."""
    good = json.dumps(body(0)).encode()
    size, length = len(good), b"Content-Length: "
    lengths = (b"-1", b"x", b"1e3", b"9" * 30, b"+5", b"")
    names = (
        b"no colon", b": no name", b"Na\0me: a", b"Name: \0", b"Na me: a",
        b"X: " + b"a" * 10**6,
    )  # fmt: skip
    paths = (
        b"/\xff", b"/%ff%fe", b"/%00", b"/../../etc/passwd", b"http://[", b"*", b"//",
        b"/v1/models/%2e%2e", b"/v1/models/" + b"%f0%9f" * 99, b"/" * 10**6,
    )  # fmt: skip
    wrong = [
        *(head(None, length + one) + good for one in lengths),
        head(None, length + b"5", length + b"6") + good,
        head(None, b"Transfer-Encoding: gzip") + good,
        head(size, b"Transfer-Encoding: chunked") + good + b"\r\n",
        *(CHUNKED + one + b"\r\n" + good for one in (b"zz", b"f" * 30, b"-5")),
        *(head(size, one) + good for one in names),
        head(size, *(b"X-%d: a" % i for i in range(20_000))) + good,
        *(b"GET " + one + b" HTTP/1.1\r\nHost: a\r\n\r\n" for one in paths),
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\0" * 500, b"\r\n" * 50 + b"\0",
        b"POST\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"A" * 10**6,
    ]  # fmt: skip
    return f"{len(wrong)} heads that are none", Counter(server.sent(one, 10) for one in wrong)


def poisoned(server: Server, smoke: bool) -> tuple[str, Counter[str]]:
    """Orders of a plugin that raise, or answer with what is no token, at their third step."""
    routes = [("/v1/completions", False), ("/v1/completions", True), ("/v1/denoise", True)]
    ways = [(name, *route) for name in POISONS for route in routes] * (1 if smoke else 4)

    def client(number: int) -> str:
        name, path, stream = ways[number]
        return ask(server.port, body(number, LONG, sampler=name, stream=stream), path).kind

    return f"{len(ways)} requests whose order fails", together(len(ways), client)


# Fault → how its clients may be answered
FAULTS: dict[Callable[[Server, bool], tuple[str, Counter[str]]], set[str]] = {
    vanish: {"gone by RST", "gone by FIN"},
    slow: {"whole"},
    half: {"byte by byte: 200", "half, then FIN", "half, then RST", "never ended: 408",
           "fed until cut off", "half a head: closed", "half a head: reset"},
    large: {"with a length: 413", "without a length: 413"},
    text: {"400"},
    deep: {"400"},
    less_deep: {"200", "400"},
    numbers: {"200", "400", "429"},
    lines: {"400", "404", "405", "reset"},
    poisoned: {"500", "error in the stream"},
}  # fmt: skip


def shown(server: Server, fault: Any, smoke: bool) -> dict[str, Any]:
    """One fault beside ordinary requests, and what it left."""
    before, begin = server.rss, time.monotonic()
    with company(server) as beside:
        what, statuses = fault(server, smoke)
        over = time.monotonic()
        free = server.until(lambda: server.busy <= 2, "rows that are free")
    server.until(lambda: server.busy == 0, "an empty server")
    wish = body(0)
    answer = ask(server.port, wish)
    server.check(
        answer.kind == "whole" and server.compare(wish, [answer.text]), "no answer afterwards"
    )
    server.check(set(statuses) <= FAULTS[fault], f"{fault.__name__}: {dict(statuses)}")
    return {
        "sent": what, "answers": dict(sorted(statuses.items())),
        "seconds": round(over - begin, 2), "seconds_until_rows_were_free": round(free, 3),
        "compared": beside["compared"] + 1, "equal": beside["equal"] + (answer.kind == "whole"),
        "longest_ordinary_seconds": beside["longest"], "rss_mb_before": before,
        "rss_mb_peak": max(beside["peak"], before), "rss_mb_after": server.rss,
    }  # fmt: skip


# Name → the signal, `--drain`, how clients may be answered
ENDS: dict[str, tuple[signal.Signals, int, set[str]]] = {
    "sigterm": (signal.SIGTERM, 20, {"whole", "stream: whole", "late: 503"}),
    "sigterm_hasty": (
        signal.SIGTERM, 1, {"503", "stream: 503", "stream: error in the stream", "late: 503"}
    ),
    "sigkill": (signal.SIGKILL, 20, {"lost", "stream: cut", "stream: lost", "late: lost"}),
}  # fmt: skip


def ended(
    server: Server, name: str, new: int = LONG, clients: int = 16, late: int = 4
) -> dict[str, Any]:
    """A signal under load: what became of its clients and of the process."""
    sign, drain, allowed = ENDS[name]
    begun, struck, equal = threading.Semaphore(0), threading.Event(), []

    def client(number: int) -> str:
        wish, way = body(number, new, stream=number % 2 == 0), "stream: " * (number % 2 == 0)
        if number >= clients:
            struck.wait(PATIENCE)
            wish, way = body(number), "late: "
        answer = ask(server.port, wish, begun=begun.release)
        if answer.kind == "whole":
            equal.append(server.compare(wish, [answer.text]))
        return way + answer.kind

    def strike() -> str:
        for _ in range(clients):
            begun.acquire(timeout=PATIENCE)
        time.sleep(0.1)
        server.check(server.metric("rows") == clients, "the load was over before the signal")
        server.process.send_signal(sign)
        begin = time.monotonic()
        time.sleep(0.2)
        struck.set()
        code = server.ended(PATIENCE)
        seconds = time.monotonic() - begin
        server.check(code == (-9 if sign is signal.SIGKILL else 0), f"{name}: exit code {code}")
        # A second for the readers of what was written, and what Python takes to end.
        server.check(seconds <= drain + 6, f"{name}: {seconds} seconds until it ended")
        told.update(exit_code=code, seconds_to_exit=round(seconds, 2))
        return "struck"

    told: dict[str, Any] = {}
    number = clients + late
    found = together(number + 1, lambda one: client(one) if one < number else strike())
    del found["struck"]
    server.check(set(found) <= allowed, f"{name}: {dict(found)}")
    return {
        "sent": f"{sign.name} beside {clients} clients, {late} after it; --drain {drain}",
        "answers": dict(sorted(found.items())), **told,
        "compared": len(equal), "equal": sum(equal),
    }  # fmt: skip


def campaign(
    model: str, smoke: bool, folder: Path, launch: Launch = launched,
    tell: Callable[[str, Any], object] = lambda name, found: None,
) -> dict[str, Any]:  # fmt: skip
    """All faults one after the other; `wrong` lists what should not have come out."""
    plugin = folder / "poison.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    known = Known(*blockdiff.load(model))
    wrong: list[str] = []
    found: dict[str, Any] = {}

    def start(port: int, drain: int) -> Server:
        return Server(model, plugin, known, wrong, launch, port=port, drain=drain)

    server = start(0, 20)
    try:
        for fault in FAULTS:
            found[fault.__name__] = shown(server, fault, smoke)
            tell(fault.__name__, found[fault.__name__])
        for name in ["sigkill", "sigterm"] if smoke else ENDS:
            if server.over:
                server = start(server.port, ENDS[name][1])
            found[name] = ended(server, name, 4 * NEW if smoke else LONG)
            tell(name, found[name])
        if not smoke:
            server = start(server.port, 20)
            found[name]["seconds_until_restarted"] = round(server.seconds_to_ready, 2)
            wish = body(1)
            server.check(
                server.compare(wish, [ask(server.port, wish).text]), "no answer after a restart"
            )
    finally:
        server.stop()
    return {"model": model, "faults": found, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="starter")
    parser.add_argument("--smoke", action="store_true", help="a few of each; nothing is written")
    given = parser.parse_args()

    def tell(name: str, found: dict[str, Any]) -> None:
        numbers = ("seconds", "seconds_until_rows_were_free", "seconds_to_exit", "equal",
                   "rss_mb_before", "rss_mb_peak", "rss_mb_after")  # fmt: skip
        said = [f"{one} {found[one]}" for one in numbers if one in found]
        print(f"{name:14} {found['answers']}\n{'':14} {', '.join(said)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        record = campaign(given.model, given.smoke, Path(folder), tell=tell)
    for one in record["wrong"]:
        print(f"WRONG: {one}")
    if not given.smoke:
        RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(record["wrong"]))


if __name__ == "__main__":
    main()
