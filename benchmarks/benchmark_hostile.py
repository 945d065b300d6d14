"""Attack a server, and measure what its other clients notice.

The script starts `nanollm-serve` with two keys and a limit of 256 open files. One key belongs
to well-behaved clients: streams of tokens that never end (itl; one, or as many as --streams
says), `/health` every 10 ms on a kept connection (health) and every 100 ms on a new one
(connect), and newcomers who ask for a single token (first). The other key sends one hostile
request after the other. A row says what the attacker was answered, and for each kind of client
the longest wait: in the calm seconds before, and from the attack until all are served again.
The column `own` is the lag of this script itself; nothing below it is measured.

    python benchmarks/benchmark_hostile.py                          # the server of this tree
    python benchmarks/benchmark_hostile.py --tree ../before         # of another one
    python benchmarks/benchmark_hostile.py --only stop --only idle  # attacks with these words
    python benchmarks/benchmark_hostile.py --only grammar --streams 8  # bombs for a compiler

A table goes to stderr; the last line of stdout is one JSON object. See nbs/29_server.ipynb.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import resource
import signal
import string
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

KEYS = {"attacker": "attacker-key", "others": "key-of-others"}
SEEN = ("health", "connect", "itl", "first", "own")  # the order of the columns


def raw_request(path, body=b"", headers="Connection: close\r\n", key="attacker", length=None):
    "Return the bytes of a POST, or of a GET if there is no body."
    length = len(body) if length is None else length
    head = (
        f"{'POST' if length else 'GET'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}"
        f"Authorization: Bearer {KEYS[key]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n"
    )
    return f"{head}\r\n".encode() + body


def raw_json(path, key="attacker", **fields):
    "Return the bytes of a POST of a JSON object."
    return raw_request(path, json.dumps(fields, separators=(",", ":")).encode(), key=key)


@dataclass(frozen=True)
class Attack:
    "What the attacker sends, on how many connections, and how long it stays."

    name: str
    raw: bytes | tuple[bytes, ...]  # on each connection, or one after the other for the copies
    copies: int = 1
    patience_s: float = 20.0  # then it hangs up


TEXT, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def wrong_types(size):
    "Return requests whose many values have a wrong type, or are out of range."
    ones, strings, minus = [1] * (size // 2), ["a"] * (size // 4), [-1] * (size // 3)
    pairs = {f"{i}": "a" for i in range(size // 13)}
    user = {"role": "user", "content": "hi"}
    raw = {
        "stop of integers": raw_json(TEXT, prompt="a", stop=ones),
        "stop_token_ids of strings": raw_json(TEXT, prompt="a", stop_token_ids=strings),
        "logit_bias of strings": raw_json(TEXT, prompt="a", logit_bias=pairs),
        "prompt ids of -1": raw_json(TEXT, prompt=minus),
        "prompt ids, the last a string": raw_json(TEXT, prompt=[*ones, "a"]),
        "prompts of nothing": raw_json(TEXT, prompt=[[]] * (size // 3)),
        "detokenize strings": raw_json("/detokenize", tokens=strings),
        "detokenize -1": raw_json("/detokenize", tokens=minus),
        "messages of integers": raw_json(CHAT, messages=ones),
        "parts of integers": raw_json(CHAT, messages=[{"role": "user", "content": ones}]),
        "tools of integers": raw_json(CHAT, messages=[user], tools=ones),
        "unknown fields": raw_json(CHAT, messages=[user], max_tokens=1, **pairs),
        "input items of integers": raw_json(RESPONSES, input=ones),
    }
    return [Attack(name, one) for name, one in raw.items()]


def too_large(size):
    "Return requests that are well formed, and large."
    draw, ids = random.Random(0), [1] * (size // 4)
    words = "".join(draw.choices(string.ascii_lowercase, k=size - 1024))  # slow to tokenize
    chat = raw_json(CHAT, messages=[{"role": "user", "content": words}], max_tokens=1)
    items = [{"role": "user", "content": "a"}] * (size // 32)
    turns = raw_json(CHAT, messages=items[:4096], max_tokens=1)
    return [
        Attack("chat of 4 MB", chat),
        Attack("8 chats of 4 MB, hung up", chat, 8, 0.3),
        Attack("8 prompts of 4 MB, hung up", raw_json(TEXT, prompt=words), 8, 0.3),
        Attack("16 /tokenize of 64 kB", raw_json("/tokenize", prompt=words[: 2**16]), 16),
        Attack(
            "/tokenize of 4 MB", raw_json("/tokenize", prompt=words, return_token_strs=True)
        ),
        Attack("a million ids", raw_json(TEXT, prompt=ids)),
        Attack("detokenize a million ids", raw_json("/detokenize", tokens=ids)),
        Attack("chat of 4,096 turns", turns, 4),
        Attack("130,000 input items", raw_json(RESPONSES, input=items, max_output_tokens=1)),
    ]


def hungry():
    "Return requests that ask for much."
    one = {"prompt": "The sea is", "max_tokens": 32, "ignore_eos": True}
    ids = [*range(9, 1009)]
    return [
        Attack("n=64", raw_json(TEXT, **one, n=64)),
        Attack("n=64, top_p=0.99", raw_json(TEXT, **one, n=64, top_p=0.99)),
        Attack("n=64, logprobs=5", raw_json(TEXT, **one, n=64, logprobs=5)),
        Attack("64 answers of one tenant", raw_json(TEXT, **one | {"max_tokens": 128}), 64),
        Attack("200 answers of one tenant", raw_json(TEXT, **one | {"max_tokens": 128}), 200),
        Attack("echo of 1,000 ids", raw_json(TEXT, prompt=ids, echo=True, logprobs=5)),
        Attack("8 echoes of 1,000 ids", raw_json(TEXT, prompt=ids, echo=True, logprobs=5), 8),
    ]


def zipped(num_bytes):
    "Compress zeros, a piece at a time."
    packer, piece = zlib.compressobj(1, wbits=31), b"\0" * 2**20
    return b"".join(packer.compress(piece) for _ in range(num_bytes >> 20)) + packer.flush()


def malformed(size):
    "Return bodies that decoders choke on."
    zip_headers = "Content-Encoding: gzip\r\nConnection: close\r\n"
    zeros, half = b"[" + b"0," * (size // 2) + b"0]", size // 2
    deep = b"[" * 180 + b"]" * 180  # as deep as the parser takes it
    deep = b'{"messages": [{"role": "user", "content": ' + deep + b"}]}"
    return [
        Attack("gzip bomb of 512 MB", raw_request(TEXT, zipped(2**29), zip_headers)),
        Attack("4 MB of zeros in gzip", raw_request(TEXT, gzip.compress(zeros), zip_headers)),
        Attack("4 MB of zeros", raw_request(TEXT, zeros)),
        Attack("JSON 2,000,000 deep", raw_request(TEXT, b"[" * half + b"]" * half)),
        Attack("content 180 deep", raw_request(CHAT, deep)),
    ]


def idlers():
    "Return connections that say little and stay."
    headers, kept = raw_request("/health")[:60], raw_request("/health", headers="")
    body = raw_request(TEXT, b"{" * 2**18, length=2**22)
    return [
        Attack("100 half-sent headers", headers, 100, 4.0),
        Attack("30 half-sent bodies", body, 30, 4.0),
        Attack("300 idle connections", b"", 300, 6.0),
        Attack("300 half-sent headers", headers, 300, 6.0),
        Attack("300 kept after a request", kept, 300, 6.0),
    ]


def bombs():
    "Return JSON schemas that a compiler hangs on, or crashes; and one that is well."
    null, texts = {"type": "null"}, {"type": "string"}
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(6000)}
    optional = {f"a{i}": null for i in range(10_000)}
    names = {f"^a{i}x": null for i in range(1000)}
    return {
        "multipleOf": {"type": "integer", "multipleOf": 9999991},
        "multipleOf of 0.5 s": {"type": "integer", "multipleOf": 69997},
        "1,000 patternProperties": {"type": "object", "patternProperties": names},
        "10,000 optional properties": {"type": "object", "properties": optional},
        "6,000 chained $ref": {"$defs": links | {"d6000": null}, "$ref": "#/$defs/d0"},
        "$ref to itself": {"$ref": "#"},
        "20,000 values": {"enum": [f"value {i}" for i in range(20_000)]},
        "a value of 200 kB": {"const": "la " * 70_000},
        "100,000 items": {"type": "array", "items": null, "minItems": 100_000},
        "an open object": {"type": "object"},
        "many states": texts | {"pattern": "^(a|b)*a(a|b){30}$"},
    }


def constrained():
    "Return requests whose answers have a form that is hard to compile or to hold."
    chat = {"messages": [{"role": "user", "content": "Say something."}], "ignore_eos": True}

    def asks(schema, **fields):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        fields = {"max_tokens": 64, "response_format": form} | fields
        return raw_json(CHAT, **chat, **fields)

    found, schemas = {name: asks(schema) for name, schema in bombs().items()}, bombs()
    rules = [f'r{i}: "a" r{i + 1}' for i in range(20_000)]
    asked = {
        "regex": "(a{1000}){1000}",
        "grammar": "\n".join(["start: r0", *rules, 'r20000: "b"']),
        "choice": [f"{i} " * 40 for i in range(1024)],
        "structural_tag": "[" * 10_000,
    }
    for name, value in asked.items():
        constraint = {"structured_outputs": {name: value}}
        found[name] = raw_json(TEXT, prompt="a", max_tokens=64, **constraint)
    bomb = {"type": "object", "properties": {"a": schemas["multipleOf"]}, "required": ["a"]}
    function = {"name": "f", "strict": True, "parameters": bomb}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    found["a tool's parameters"] = raw_json(CHAT, **chat, **tools, max_tokens=64)
    text = {"format": {"type": "json_schema", "name": "a", "schema": bomb}}
    found["responses"] = raw_json(RESPONSES, input="a", max_output_tokens=64, text=text)
    links = schemas["6,000 chained $ref"]
    eight = {
        "8 bombs": [{"type": "integer", "multipleOf": 9999991 - 2 * i} for i in range(8)],
        "8 chains": [links | {"title": f"{i}"} for i in range(8)],
    }
    many = asks(schemas["many states"], max_tokens=400, temperature=1.5)
    return [
        *(Attack(f"grammar: {name}", raw) for name, raw in found.items()),
        *(Attack(f"grammar: {name}", tuple(map(asks, several)), 8, 60.0)
          for name, several in eight.items()),
        Attack("grammar: 16 x many states", many, 16, 60.0),
    ]


def all_attacks(size=2**22 - 2**10):  # just below the server's limit for bodies
    "Return every attack; those that may take the server down are the last."
    sane = [*wrong_types(size), *too_large(size), *hungry(), *constrained()]
    return [*sane, *malformed(size), *idlers()]


class Probe:
    "How long one kind of client waits, again and again."

    def __init__(self):
        self.waits = []  # (end, seconds)
        self.started = None  # since when it waits now
        self.num_failures = 0

    def begin(self):
        "Start to wait, unless it does."
        self.started = time.perf_counter() if self.started is None else self.started

    def end(self):
        "Note the wait that is over."
        now = time.perf_counter()
        self.waits.append((now, now - self.started))
        self.started = None

    def worst(self, since):
        "Return the longest wait, in seconds, that was not over at `since`."
        waits = [seconds for end, seconds in self.waits if end > since]
        now = time.perf_counter()
        return max([*waits, 0.0 if self.started is None else now - self.started])

    def served_since(self, when):
        "Say whether a wait has begun and ended after `when`."
        return any(end - seconds > when for end, seconds in self.waits[-64:])


async def head_of(reader):
    "Return the status of an answer and the length of its body."
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return int(head.split(b" ", 2)[1]), int(length[1]) if length else 0


class Others:
    "The well-behaved clients of a server."

    def __init__(self, port, process):
        self.port, self.process, self.peak_bytes = port, process, 0
        self.probes = {name: [Probe()] for name in SEEN}

    async def ask(self, name, raw, pause_s, keep=False):
        "Send one request again and again, over one connection or over new ones."
        [probe], writer = self.probes[name], None
        while True:
            probe.begin()
            new, served = writer is None, False
            try:
                if new:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(raw)
                status, length = await head_of(reader)
                await reader.readexactly(length)
                if status != 200:
                    raise ConnectionError(f"status {status}")
                probe.end()
                served = True
            except (OSError, asyncio.IncompleteReadError):
                probe.num_failures += (
                    new  # to close a kept connection is fine; the wait goes on
                )
            finally:
                if writer and not (keep and served):
                    writer.close()
                    writer = None
            await asyncio.sleep(pause_s if served or new else 0)

    async def stream(self, probe, num_tokens):
        "Read one long answer after the other, token by token."
        body = {"prompt": "Once upon a time", "max_tokens": num_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "skip_special_tokens": False}
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                with contextlib.closing(writer):
                    writer.write(raw_json(TEXT, key="others", **body))
                    async for line in reader:
                        if line.startswith(b"data: {"):
                            if probe.started is not None:
                                probe.end()
                            probe.begin()
                        if line.startswith(b"data: [DONE]"):
                            probe.started = None
                            break
            probe.num_failures += probe.started is not None  # it broke off: the wait goes on
            await asyncio.sleep(0.01)

    async def own_lag(self):
        "Measure how late this script itself is, and how much memory the server takes."
        [probe] = self.probes["own"]
        while True:
            with contextlib.suppress(psutil.Error):
                self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss)
            start = time.perf_counter()
            await asyncio.sleep(0.01)
            probe.started = min(start + 0.01, time.perf_counter())
            probe.end()

    def start(self, num_streams, num_tokens):
        "Start them all; return their tasks."
        self.probes["itl"] = [Probe() for _ in range(num_streams)]
        small = {"prompt": "One two three", "max_tokens": 1, "temperature": 0}
        kept = raw_request("/health", headers="", key="others")
        work = [
            self.ask("health", kept, 0.01, keep=True),
            self.ask("connect", raw_request("/health", key="others"), 0.1),
            self.ask("first", raw_json(TEXT, key="others", **small), 0.25),
            *(self.stream(probe, num_tokens) for probe in self.probes["itl"]),
            self.own_lag(),
        ]
        return [asyncio.create_task(one) for one in work]

    async def settle(self, when, timeout_s):
        "Wait until all are served again, for requests made after `when`; return whether."
        end = time.perf_counter() + timeout_s
        while not all(probe.served_since(when) for probe in self.all_probes()):
            if time.perf_counter() > end or not self.process.is_running():
                return False
            await asyncio.sleep(0.05)
        return True

    def all_probes(self):
        "Return all probes, of all kinds."
        return [probe for probes in self.probes.values() for probe in probes]

    def seen(self, since):
        "Return the worst wait of each kind in milliseconds."
        worst = {name: max(probe.worst(since) for probe in self.probes[name]) for name in SEEN}
        return {name: round(1e3 * seconds, 1) for name, seconds in worst.items()}

    def failures(self):
        "Count the requests that did not get what they asked for."
        return sum(probe.num_failures for probe in self.all_probes())


async def send(port, attack, copy):
    "Send one copy; return the status of the answer, or how it went."
    raw = attack.raw[copy % len(attack.raw)] if isinstance(attack.raw, tuple) else attack.raw
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "refused"
    try:
        async with asyncio.timeout(attack.patience_s):
            writer.write(raw)
            status = (await reader.readline()).split(b" ", 2)[1:2]
            while await reader.read(2**16):
                pass
            return status[0].decode() if status else "closed"
    except TimeoutError:
        return "hung up"
    except OSError:
        return "closed"
    finally:
        writer.transport.abort()


async def run_attack(attack, others, log, args):
    "Attack once; return the row."
    calm_start = time.perf_counter()
    await asyncio.sleep(args.calm_seconds)
    calm, failures = others.seen(calm_start), others.failures()
    others.peak_bytes = before_bytes = others.process.memory_info().rss
    lines, start = log.read_bytes().count(b"\n"), time.perf_counter()
    copies = (send(others.port, attack, i) for i in range(attack.copies))
    statuses = await asyncio.gather(*copies)
    end = time.perf_counter()
    recovered = await others.settle(end, args.settle_seconds)
    return {
        "attack": attack.name,
        "answers": dict(Counter(statuses)),
        "attack_s": round(end - start, 2),
        "calm_ms": calm,
        "worst_ms": others.seen(start),
        "recovered": recovered,
        "failures_of_others": others.failures() - failures,
        "log_lines": log.read_bytes().count(b"\n") - lines,
        "memory_mb": round((others.peak_bytes - before_bytes) / 2**20),
    }


def start_server(args, log):
    "Start a server that logs to a file; return its process and port."
    start = "from nanollm.serve.cli import serve_main; serve_main()"
    command = [sys.executable, "-P", "-c", start]
    options = {"--model": args.model, "--load-format": args.load_format, "--dtype": args.dtype}
    options |= {"--device": args.device, "--threads": str(args.threads), "--port": "0"}
    words = [[name, value] for name, value in options.items() if value is not None]
    words += [["--api-key", key] for key in KEYS.values()]

    def limit_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.max_files, args.max_files))

    env = os.environ | {"PYTHONPATH": str(Path(args.tree).resolve())}
    server = subprocess.Popen(
        [*command, *(word for pair in words for word in pair)],
        stderr=log.open("wb"),
        env=env | {"OMP_NUM_THREADS": str(args.threads)},
        preexec_fn=limit_files,
    )
    while server.poll() is None:
        if found := re.search(r"on http://\S+:(\d+)", log.read_text(errors="replace")):
            return server, int(found[1])
        time.sleep(0.1)
    raise SystemExit(f"the server has ended:\n{log.read_text(errors='replace')[-2000:]}")


def table_row(row):
    "Return the row as one line: calm > worst in milliseconds, for each kind of client."
    pairs = (f"{row['calm_ms'][name]:.0f} > {row['worst_ms'][name]:.0f}" for name in SEEN)
    answers = ", ".join(f"{count} x {name}" for name, count in row["answers"].items())
    waits = "".join(f"{pair:>14}" for pair in pairs)
    counts = f"{row['failures_of_others']:7d}{row['log_lines']:8d}{row['memory_mb']:7d}"
    end = "" if row["recovered"] else "; the server does not recover"
    return f"{row['attack']:33}{waits}{counts}  {answers}{end}"


def stop_server(server):
    "End a server, one that hangs too; return its exit code."
    server.terminate()
    try:
        return server.wait(timeout=40)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


async def attack_all(attacks, process, port, log, args):
    "Attack a server until it does not recover; return the rows."
    others, rows = Others(port, psutil.Process(process.pid)), []
    tasks = others.start(args.streams, args.stream_tokens)
    await others.settle(time.perf_counter(), args.settle_seconds)
    for attack in attacks:
        rows.append(await run_attack(attack, others, log, args))
        print(table_row(rows[-1]), file=sys.stderr)
        if not rows[-1]["recovered"]:
            break
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return rows


def main():
    summary, _, details = __doc__.partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=layout
    )
    parser.add_argument("--tree", default=str(Path(__file__).parents[1]), help="whose server")
    parser.add_argument("--model", help="as for nanollm-serve; by default the default model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine (1)")
    parser.add_argument("--max-files", type=int, default=256, help="open files allowed (256)")
    parser.add_argument("--streams", type=int, default=1, help="healthy answers at once (1)")
    parser.add_argument("--stream-tokens", type=int, default=1000, help="of a healthy answer")
    parser.add_argument("--calm-seconds", type=float, default=2.0, help="before an attack (2)")
    parser.add_argument("--settle-seconds", type=float, default=60.0, help="after it (60)")
    parser.add_argument("--only", action="append", metavar="WORD", help="attacks by name")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    words, rows = args.only or [""], []
    attacks = [one for one in all_attacks() if any(word in one.name for word in words)]
    head = f"{'attack (ms: calm > worst)':33}" + "".join(f"{name:>14}" for name in SEEN)
    print(f"{head}  failed   lines     MB  answers", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        while len(rows) < len(attacks):  # again, if a server did not recover
            process, port = start_server(args, log)
            try:
                left = attacks[len(rows) :]
                rows += asyncio.run(attack_all(left, process, port, log, args))
            finally:
                print("exit code of the server:", stop_server(process), file=sys.stderr)
    print(json.dumps(vars(args) | {"attacks": rows}))


if __name__ == "__main__":
    main()
