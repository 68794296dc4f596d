"""What goes wrong with a server: a few of each fault that `benchmarks/serving_faults.py` shows."""

import importlib
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from processes import started

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from blockdiff.serving import gate  # noqa: E402
from blockdiff.serving.app import make_app  # noqa: E402
from blockdiff.serving.limits import Limits  # noqa: E402
from blockdiff.serving.port import listen  # noqa: E402
from blockdiff.serving.wire import Wire  # noqa: E402

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("serving_faults")


def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def launch(tmp_path):
    """Starts a server forked from a process that has imported torch already."""
    processes = []

    def one(words):
        streams = tmp_path / str(len(processes))
        process = started(streams, words, one_thread)
        processes.append(process)

        def ended(seconds):
            process.join(seconds)
            return process.exitcode

        until = time.monotonic() + 60
        said = streams / "stderr"
        while not said.exists() or "\n" not in said.read_text():
            assert time.monotonic() < until and process.is_alive()
            time.sleep(0.01)
        return process.pid, ended, said.read_text().partition("\n")[0]

    yield one
    for process in processes:
        process.kill()
        process.join()


def test_the_server_goes_on_and_nobody_gets_another_s_text(script, launch, tmp_path):
    record = script.campaign("starter", True, tmp_path, launch)
    assert record["wrong"] == []
    for name, found in record["faults"].items():
        assert name == "sigkill" or found["equal"] == found["compared"] >= 4, name


@pytest.fixture
def served():
    """Serves an app with these times in a thread; gives its port."""
    ends = []

    def one(app, **times):
        wire = type("Hasty", (Wire,), times)
        taken = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, http=wire, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
        thread.start()
        ends.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return taken.getsockname()[1], server

    yield one
    for server, thread in ends:
        server.should_exit = True
        thread.join(10)


def closed(link):
    """Whether the server ends a connection; what it said."""
    told = b""
    link.settimeout(10)
    try:
        while part := link.recv(65536):
            told += part
    except ConnectionResetError:
        pass
    return told


def wait_for(truth):
    until = time.monotonic() + 10
    while not truth():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


def test_a_head_that_does_not_come(served):
    port, _ = served(make_app({}, Limits()), head_seconds=0.3)
    health = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    for begun in (b"", b"POST /v1/completions HT", health[:-2]):
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(begun)
            assert closed(link) == b""
    with socket.create_connection(("127.0.0.1", port)) as link:
        for _ in range(4):  # a connection that is used is not cut off
            link.sendall(health)
            told = b""
            while not told.endswith(b"}"):
                told += link.recv(65536)
            time.sleep(0.15)
        link.sendall(health[:20])
        assert closed(link) == b""
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"GET / HTTP/1.1\r\nX: ")
        with pytest.raises(OSError):
            for _ in range(100):  # which httptools would keep
                link.sendall(b"a" * 65536)
                time.sleep(0.001)


def test_one_who_does_not_read_is_cut_off(served):
    sizes = []

    async def endless(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(sizes[-1]):
            await send({"type": "http.response.body", "body": b"a" * 10**6, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    port, server = served(endless, read_seconds=0.3)
    for size, whole in ((100, False), (20, True)):
        sizes.append(size)
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            if whole:  # slow, and never without reading
                told = 0
                while told < 20 * 10**6:
                    told += len(link.recv(2**18))
                    time.sleep(0.005)
            else:
                wait_for(lambda: server.server_state.connections)
                wait_for(lambda: not server.server_state.connections)
                assert len(closed(link)) < 50 * 10**6


def test_what_is_sent_on_after_a_refusal_is_thrown_away_for_a_while(served, monkeypatch):
    monkeypatch.setattr(gate, "LINGER", 0.5)
    port, server = served(make_app({}, Limits(body_bytes=1000)))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(head)
        with pytest.raises(OSError):
            for _ in range(1000):
                link.sendall(b"a")
                time.sleep(0.01)
    wait_for(lambda: not server.server_state.connections)
    with socket.create_connection(("127.0.0.1", port)) as link:  # a quick one hears the answer
        link.sendall(head)
        for _ in range(100):
            link.sendall(b"a" * 10**6)
        assert b" 413 " in (told := closed(link)) and b"connection: close" in told
