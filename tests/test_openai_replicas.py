"""Every test of the official client once more, against two replicas behind a door."""

import asyncio
import contextlib
import inspect
import socket
import threading
import time

import pytest
import test_openai_client as one_engine
from server_fixtures import Running
from test_openai_client import client, lenient  # noqa: F401
from test_replicas import Local

from nanollm.args import ServerArgs
from nanollm.serve.gate import Gate
from nanollm.serve.process import http_server

THEIRS = {"server", "client", "lenient"}


def asks_from_outside(test):
    "Whether a test asks the server of the module, and changes nothing inside of it."
    names = {*inspect.signature(test).parameters}
    return bool(THEIRS & names) and "monkeypatch" not in names


globals().update({name: test for name, test in vars(one_engine).items()
                  if name.startswith("test_") and asks_from_outside(test)})


class Replicated(Local):
    "Replicas, and a door to them at a socket, on a thread of their own."

    def __init__(self, **options):
        super().__init__(**options)
        self.sock, self.server = socket.create_server(("127.0.0.1", 0)), None
        self.args = ServerArgs(("tiny", "an/alias"), max_stored_responses=8)

    async def serve(self):
        async with self:
            self.server = http_server(Gate(self.door, self.args), self.args)
            self.loop = asyncio.get_running_loop()
            await self.server.serve([self.sock])


@pytest.fixture(scope="module")
def server():
    found = Replicated(engine_options={"num_kv_blocks": 2048})
    thread = threading.Thread(target=asyncio.run, args=(found.serve(),))
    thread.start()
    with contextlib.ExitStack() as end:
        end.callback(thread.join)
        while not (found.server and found.server.started):
            assert thread.is_alive(), "the server has ended before it was there"
            time.sleep(0.01)
        end.callback(setattr, found.server, "should_exit", True)
        url = f"http://127.0.0.1:{found.sock.getsockname()[1]}"
        first = next(iter(found.replicas.values()))
        yield Running(url, first.api, first.api.engine._engine, found.loop)
