"""Connections at their limit, slow clients, sockets of all kinds, and the end of a process."""

import asyncio
import contextlib
import gc
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from starlette.responses import JSONResponse, StreamingResponse

from nanollm.args import ServerArgs
from nanollm.serve import process as module
from nanollm.serve.gate import Gate, cancel_on_disconnect
from nanollm.serve.process import http_server, room_for_connections, serve_until

ARGS = ServerArgs(("tiny",), shutdown_timeout_s=1.0)
GET = b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n"


class App:
    "Answers at once, except at /slow, where it waits, and at /much, where it does not end."

    def __init__(self):
        self.may_go, self.started = threading.Event(), 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        if scope["path"] == "/slow":
            self.started += 1
            while not self.may_go.is_set():
                await asyncio.sleep(0.01)
        answer = JSONResponse({"path": scope["path"]})
        if scope["path"] == "/health":
            await cancel_on_disconnect(receive, asyncio.sleep(0.01))
        if scope["path"] == "/much":
            answer = StreamingResponse(self.much())
        await answer(scope, receive, send)

    async def much(self):
        for _ in range(10_000):
            yield b"x" * 2**16


@contextlib.contextmanager
def serving(max_connections=4, args=ARGS, sockets=None):
    "Run the small application behind a gate; yields its address, itself and the server."
    app = App()
    server = http_server(Gate(app, args), args, max_connections)
    sockets = sockets or [socket.create_server(("127.0.0.1", 0))]
    # on asyncio's own loop, as nanollm-serve: another one may be what `server.run` finds
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield SimpleNamespace(address=sockets[0].getsockname(), app=app, server=server)
    finally:
        app.may_go.set()
        server.should_exit = True
        thread.join()


def connect(found, content=b""):
    sock = socket.create_connection(found.address, timeout=20)
    sock.sendall(content)
    return sock


def is_whole(data):
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(end) and len(body) >= (int(length[1]) if length else 0)


def answer_of(sock):
    "An answer, as far as it came; empty if the server has closed."
    data = b""
    with contextlib.suppress(ConnectionError):
        while not is_whole(data) and (piece := sock.recv(65536)):
            data += piece
    return data.decode()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_small_packets_do_not_wait(monkeypatch):
    seen, made = [], module.Connection.connection_made

    def note(self, transport):
        made(self, transport)
        sock = transport.get_extra_info("socket")
        seen.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(module.Connection, "connection_made", note)
    with serving() as found, connect(found, GET % b"/x") as sock:
        assert answer_of(sock).startswith("HTTP/1.1 200")
        assert seen == [1], "an answer's body would wait until the client confirms its head"


def test_silent_clients_give_way_to_the_next(caplog):
    with serving(4) as found, caplog.at_level(logging.WARNING, "nanollm.serve.process"):
        silent = [connect(found, b"GET /x HT" if i % 2 else b"") for i in range(40)]
        for _ in range(3):
            with connect(found, GET % b"/v1/models") as sock:
                assert answer_of(sock).startswith("HTTP/1.1 200")
        until(lambda: len(found.server.server_state.connections) <= 4)
        assert all(answer_of(sock) == "" for sock in silent[:36]), "the longest idle are closed"
        [line] = [r.getMessage() for r in caplog.records if r.name == module.__name__]
        assert line.startswith("4 connections are open")
        for sock in silent:
            sock.close()


def test_kept_connections_give_way_and_those_at_work_do_not():
    with serving(3) as found:
        busy = [connect(found, GET % b"/slow") for _ in range(2)]
        until(lambda: found.app.started == 2)
        kept = connect(found, GET % b"/kept")
        assert answer_of(kept).startswith("HTTP/1.1 200")
        with connect(found, GET % b"/new") as sock:
            assert answer_of(sock).startswith("HTTP/1.1 200")
        kept.settimeout(5)
        until(lambda: kept.recv(65536) == b"")
        found.app.may_go.set()
        assert all(answer_of(sock).startswith("HTTP/1.1 200") for sock in busy)


def test_when_all_are_at_work():
    with serving(2) as found:
        busy = [connect(found, GET % b"/slow") for _ in range(2)]
        until(lambda: found.app.started == 2)
        for _ in range(3):
            with connect(found, GET % b"/v1/models") as sock:
                refused = answer_of(sock).lower()
                assert refused.startswith("http/1.1 503") and "retry-after: 1" in refused
                assert "connection: close" in refused and "x-request-id" not in refused
            with connect(found, GET % b"/health") as sock:
                assert answer_of(sock).startswith("HTTP/1.1 200")
        body = b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
        with connect(found, body) as sock:
            assert answer_of(sock).startswith("HTTP/1.1 200"), "nobody waits for its body"
        found.app.may_go.set()
        assert all(answer_of(sock).startswith("HTTP/1.1 200") for sock in busy)
        until(lambda: len(found.server.server_state.connections) <= 2)
        with connect(found, GET % b"/v1/models") as sock:
            assert answer_of(sock).startswith("HTTP/1.1 200")


@pytest.mark.parametrize("first", [b"", GET % b"/x"])
@pytest.mark.parametrize("drip", [b"", b"GET /y HT"])
def test_a_head_that_does_not_end(monkeypatch, first, drip):
    monkeypatch.setattr(module, "HEAD_TIMEOUT_S", 0.2)
    args = ServerArgs(("tiny",), timeout_keep_alive_s=0.3)
    with serving(args=args) as found, connect(found, first) as sock:
        if first:
            assert answer_of(sock).startswith("HTTP/1.1 200")
        for i in range(len(drip)):  # each byte comes in time, but there is one time for all
            with contextlib.suppress(ConnectionError):
                sock.sendall(drip[i : i + 1])
            time.sleep(0.05)
        until(lambda: not found.server.server_state.connections)
        assert answer_of(sock) == ""


def test_a_head_in_pieces_is_in_time():
    with serving() as found, connect(found) as sock:
        for piece in (b"GET /x HTTP/1.1\r\n", b"host: localhost\r\n", b"\r\n"):
            sock.sendall(piece)
            time.sleep(0.02)
        assert answer_of(sock).startswith("HTTP/1.1 200")
        [connection] = found.server.server_state.connections
        assert connection._head_timer is None and list(connection.lobby.waiting) == [connection]


def test_who_does_not_read_loses_its_answer(monkeypatch):
    monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.2)
    with serving() as found, connect(found, GET % b"/much"):
        until(lambda: not found.server.server_state.connections)


def test_slow_readers_keep_theirs():
    with serving() as found, connect(found, GET % b"/much") as sock:
        for _ in range(20):
            time.sleep(0.01)
            assert sock.recv(2**16)


@pytest.mark.parametrize(
    "content",
    [b"GET /x HT", b"POST /x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"],
)
def test_half_a_request_does_not_hold_up_the_end(content):
    with serving() as found:
        with connect(found, content) as sock:
            until(lambda: len(found.server.server_state.connections) == 1)
            time.sleep(0.05)
            found.server.config.timeout_graceful_shutdown = None  # it would wait for ever
            found.server.should_exit = True
            assert answer_of(sock) == ""


def test_the_limit_on_files_is_raised_and_leaves_room():
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))\n"
        "from nanollm.serve.process import room_for_connections\n"
        "print(*room_for_connections(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    connections, backlog, soft, hard = map(int, found.stdout.split())
    assert soft == hard == 256
    assert connections + 2 * backlog + 32 <= 256 - 3 and connections > 64 and backlog > 32
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections, backlog = room_for_connections()
    assert 0 < connections <= 8192 and 0 < backlog <= 2048


def engine(**more):
    async def drain(timeout_s):
        return True

    return SimpleNamespace(dead=False, num_unfinished=0, size="small", drain=drain, **more)


def served(sockets=None, app=None, drains=(), signals=1, args=ARGS):
    "Serve in a process of its own until signals come; return whether all was delivered."

    async def main():
        server = http_server(app or App(), args)
        found = sockets or [socket.create_server(("127.0.0.1", 0))]

        async def send_signals():
            while not server.started:
                await asyncio.sleep(0.01)
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)

        sending = asyncio.create_task(send_signals())
        try:
            return await serve_until(asyncio.Event(), server, found, engine(), args, drains)
        finally:
            sending.cancel()

    return asyncio.run(main())


@pytest.fixture
def freely(monkeypatch):
    "Without freezing what other tests have made, and with the signals as they were."
    monkeypatch.setattr(module.gc, "freeze", lambda: None)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_both_families_and_their_end(freely, caplog):
    sockets = [socket.create_server(("127.0.0.1", 0))]
    with contextlib.suppress(OSError):
        sockets.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
    with caplog.at_level(logging.INFO, "nanollm.serve.process"):
        assert served(sockets)
    [line] = [text for text in caplog.messages if text.startswith("serving")]
    assert line.count("http://") == len(sockets) and line.startswith("serving tiny on http://1")
    assert caplog.messages[-1] == "ended: everything promised was delivered"


def test_the_collector_is_on_while_we_serve(freely):
    gc.disable()
    try:
        assert served([socket.create_server(("127.0.0.1", 0))])
        assert gc.isenabled()
    finally:
        gc.enable()


def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "socket")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    with serving(sockets=[sock]):
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            assert client.get("http://anything/x").json() == {"path": "/x"}, "no page gets here"


def test_other_promises(freely, caplog):
    left = []

    async def kept(left_s):
        left.append(left_s)
        return True

    async def broken(left_s):
        left.append(left_s)
        return False

    with caplog.at_level(logging.INFO, "nanollm.serve.process"):
        assert served(drains=[kept])
        assert not served(drains=[broken, kept])
    assert caplog.messages[-1] == "ended: answers were cut off"
    assert len(left) == 3 and all(0 <= one <= ARGS.shutdown_timeout_s for one in left)


def test_nothing_is_announced_that_did_not_start(freely, caplog):
    async def broken(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with caplog.at_level(logging.INFO, "nanollm.serve.process"):
        assert not served(app=broken, signals=0)
    [line] = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    assert line == "the server could not start: the application has failed"


def test_a_socket_that_cannot_listen_is_not_announced(freely, caplog):
    closed = socket.socket()
    closed.close()
    with caplog.at_level(logging.INFO, "nanollm.serve.process"):
        assert not served([closed], signals=0)
    assert not [text for text in caplog.messages if text.startswith("serving")]
    assert "the server could not start" in caplog.text
