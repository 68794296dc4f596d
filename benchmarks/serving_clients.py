"""Clients of a server that is a process of its own: ordinary ones, and the sockets of bad ones.

What `serving_faults.py` is made of: texts that are known, a process, how a request ended.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import blockdiff

PROMPTS = ["The people of the", "In the beginning", "A law", "She said that", "War and", "I am"]
NEW, LONG = 24, 240  # tokens of an ordinary text, and of one that is long enough to interrupt
PATIENCE = 60.0  # seconds after which an answer counts as none
# Starts `blockdiff words`: its process id, what waits for its exit code, the line it says first.
Launch = Callable[[Sequence[str]], tuple[int, Callable[[float], int], str]]


@dataclass
class Answer:
    """How a request ended: `kind` is "whole", "cut", "lost", or how it was refused."""

    kind: str
    text: str = ""
    seconds: float = 0.0


@dataclass
class Known:
    """Texts as `blockdiff.generate` writes them alone, each prompt with its own seed."""

    model: Any
    tokenizer: Any
    found: dict[tuple[int, int], list[str]] = field(default_factory=dict)

    def texts(self, number: int, new: int, count: int = 1) -> list[str]:
        """The first texts of so many tokens that `body(number)` asks for."""
        number %= len(PROMPTS)
        known = self.found.get((number, new), [])
        if len(known) < count:
            known = self.found[number, new] = blockdiff.generate(
                self.model, PROMPTS[number], tokenizer=self.tokenizer, samples=count, seed=number,
                max_new_tokens=new, temperature=0.0,
            ).texts  # fmt: skip
        return known[:count]


def body(number: int, new: int = NEW, **more: Any) -> dict[str, Any]:
    """A request for greedy text; the seed decides in which order its tokens are fixed."""
    seed = number % len(PROMPTS)
    return {"prompt": PROMPTS[seed], "max_tokens": new, "temperature": 0, "seed": seed} | more


def refused(status: int, told: bytes) -> str:
    """The status; with what is wrong where the body is not OpenAI's."""
    try:
        error = json.loads(told)["error"]
        if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 1000:
            return f"{status}, of another shape"
    except (ValueError, KeyError, TypeError):
        return f"{status}, no JSON"
    words = error["message"]
    leaks = "secret" in words or "Traceback" in words or "site-packages" in words
    return f"{status}, tells too much" if leaks else str(status)


def ask(
    port: int, wish: dict[str, Any], path: str = "/v1/completions",
    begun: Callable[[], Any] = lambda: None,
) -> Answer:  # fmt: skip
    """One request by Python's own client; `begun` is called with the first byte of the answer."""
    begin, told, status = time.monotonic(), b"", 0
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    end = ""
    try:
        link.request("POST", path, json.dumps(wish), {"Content-Type": "application/json"})
        if not wish.get("stream"):
            begun()
        reply = link.getresponse()
        status = reply.status
        while part := reply.read1():
            if not told:
                begun()
            told += part
    except TimeoutError:
        end = "waits"
    except (OSError, http.client.HTTPException):
        end = "cut" if status else "lost"
    finally:
        link.close()
    seconds = time.monotonic() - begin
    if end or status != 200:
        return Answer(end or refused(status, told), seconds=seconds)
    if not told.startswith((b"data: ", b"event: ")):
        return Answer("whole", json.loads(told)["choices"][0]["text"], seconds)
    events = [json.loads(one) for one in re.findall(r"data: (\{.*)\n\n", told.decode())]
    if "error" in events[-1]:
        shape = refused(0, json.dumps(events[-1]).encode())
        return Answer("error in the stream" + shape.removeprefix("0"), seconds=seconds)
    if not told.endswith(b"data: [DONE]\n\n"):
        return Answer("cut", seconds=seconds)
    text = "".join(choice["text"] for one in events for choice in one["choices"])
    return Answer("whole", text, seconds)


class Server:
    """A process of `blockdiff serve`, and what is known of it."""

    def __init__(
        self, model: str, plugin: Path, known: Known, wrong: list[str], launch: Launch,
        **options: int,
    ) -> None:  # fmt: skip
        """`wrong`: where `check` notes what should not be."""
        words = ["serve", model, "--plugin", str(plugin), "--rows", "128"]
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        self.known, self.wrong, self.over = known, wrong, False
        begin = time.monotonic()
        self.pid, self._wait, address = launch(words)
        self.port = int(address.rpartition(":")[2])
        while self.get("/ready")[0] != 200:
            assert time.monotonic() - begin < PATIENCE, "the server does not begin"
            time.sleep(0.02)
        self.seconds_to_ready = time.monotonic() - begin
        self.process = psutil.Process(self.pid)

    def ended(self, seconds: float) -> int:
        """Waits for its exit code (−n for signal n)."""
        self.over = True
        return self._wait(seconds)

    def stop(self) -> None:
        if not self.over:
            self.process.kill()
            self.ended(PATIENCE)

    def get(self, path: str) -> tuple[int, str]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            link.request("GET", path)
            reply = link.getresponse()
            return reply.status, reply.read().decode()
        except ConnectionError:
            return 0, ""
        finally:
            link.close()

    def metric(self, *names: str) -> int:
        page = self.get("/metrics")[1]
        found = [re.search(rf"^blockdiff_{name}\{{.*\}} (\S+)$", page, re.M) for name in names]
        return sum(int(float(one[1])) for one in found if one is not None)

    @property
    def busy(self) -> int:
        return self.metric("rows", "queue")

    @property
    def rss(self) -> float:
        return round(self.process.memory_info().rss / 1e6, 1)

    def check(self, truth: Any, message: str) -> None:
        if not truth:
            self.wrong.append(message)

    def until(self, truth: Callable[[], bool], message: str) -> float:
        """Seconds until it is so."""
        begin = time.monotonic()
        while not truth():
            if time.monotonic() - begin > PATIENCE:
                self.wrong.append(f"{message} did not come within {PATIENCE:.0f} s")
                break
            time.sleep(0.01)
        return time.monotonic() - begin

    def raw(self, buffer: int | None = None) -> socket.socket:
        link = socket.socket()
        if buffer is not None:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        link.settimeout(PATIENCE)
        link.connect(("127.0.0.1", self.port))
        return link

    def sent(self, data: bytes, patience: float = PATIENCE) -> str:
        """How these bytes are answered."""
        with self.raw() as link:
            with suppress(OSError):  # the server may have closed: what it said is there to be read
                link.sendall(data)
            return status_of(link, patience)

    def compare(self, wish: dict[str, Any], texts: list[str]) -> bool:
        """Whether these are the texts of `wish`, and nobody else's."""
        equal = texts == self.known.texts(wish["seed"], wish["max_tokens"], len(texts))
        self.check(equal, f"another text for {wish['prompt']!r}: {texts}")
        return equal


def launched(words: Sequence[str]) -> tuple[int, Callable[[float], int], str]:
    """A process `blockdiff words`: its id, what waits for its exit code, the line it says first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blockdiff", *words], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline().strip()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process.pid, process.wait, line


@contextmanager
def company(server: Server, clients: int = 2) -> Iterator[dict[str, Any]]:
    """Ordinary requests, beside what happens meanwhile; and the most memory seen."""
    told: dict[str, Any] = {"compared": 0, "equal": 0, "longest": 0.0, "peak": 0.0}
    stop, lock = threading.Event(), threading.Lock()

    def client(first: int) -> None:
        number = first
        while not stop.is_set():
            wish = body(number, stream=bool(number // clients % 2))
            answer = ask(server.port, wish)
            with lock:
                told["compared"] += 1
                told["longest"] = max(told["longest"], round(answer.seconds, 2))
                if answer.kind == "whole":
                    told["equal"] += server.compare(wish, [answer.text])
                else:
                    server.check(False, f"an ordinary request ended as {answer.kind}")
            number += clients

    def watch() -> None:
        while not stop.wait(0.02):
            told["peak"] = max(told["peak"], server.rss)

    threads = [threading.Thread(target=client, args=(one,)) for one in range(clients)]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    try:
        yield told
        while told["compared"] < 2 * clients:  # a fault may be quick
            time.sleep(0.01)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def together(count: int, work: Callable[[int], str]) -> Counter[str]:
    """How many of so many threads ended how."""
    kinds: list[str] = []
    threads = [
        threading.Thread(target=lambda one=one: kinds.append(work(one)))  # type: ignore[misc]
        for one in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(kinds) < count:
        kinds += ["a client failed"] * (count - len(kinds))
    return Counter(kinds)


def reset(link: socket.socket) -> None:
    """Ends a connection at once, by RST."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


def status_of(link: socket.socket, patience: float = PATIENCE) -> str:
    """What the server answers, to its end or the announced length."""
    link.settimeout(patience)
    told = b""
    try:
        while not (found := re.search(rb"content-length: (\d+)\r\n(?:.*\r\n)*?\r\n", told, re.I)):
            part = link.recv(65536)
            if not part and b"\r\n\r\n" not in told:
                return "cut" if told else "closed"
            if not part:  # its length was not told
                return refused(int(told.split()[1]), told.partition(b"\r\n\r\n")[2])
            told += part
        while len(told) < found.end() + int(found[1]):
            part = link.recv(65536)
            if not part:
                return "cut"
            told += part
    except TimeoutError:
        return "waits"
    except OSError:
        return "reset"
    status = int(told.split()[1])
    return "200" if status == 200 else refused(status, told[found.end() :][: int(found[1])])
