"""Measure who should answer: conversations with two replicas, under each routing policy.

For each policy `nanollm-serve --replicas N` is started with one thread for each replica, and
people talk to it, several at a time: each has a conversation of some turns, and sends all of it
with every turn. What is reported: the share of prompt tokens that a replica had read before,
the time to the first token of turns after the first, and the share of the work that the busier
replica did. For each policy there is a line on stderr; the last line of stdout is one JSON
object. See nbs/34_replicas.ipynb and nbs/35_cluster.ipynb.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time

import httpx

POLICIES = ("round_robin", "least_loaded", "prefix")
WORDS = "river stone lamp winter paper garden engine letter music harbour bread window".split()


def start_server(args, policy):
    "Start the replicas; return the process and the address."
    program = "from nanollm.serve.cluster import serve_main; serve_main()"
    command = [sys.executable, "-c", program,
               "--port", "0", "--no-log-requests", "--replicas", str(args.replicas),
               "--routing-policy", policy, "--threads", "1", "--kv-cache-memory", "512MiB"]
    command += ["--model", args.model] if args.model else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    for line in server.stderr:
        if found := re.search(r"on (http://\S+)", line):
            return server, found[1]
    raise SystemExit(f"the server has ended with exit code {server.wait()}")


def words(rng, num):
    return " ".join(rng.choice(WORDS) for _ in range(num))


async def turn(client, messages, num_tokens):
    "Send a conversation; return the answer, and the seconds to its first token."
    body = {"messages": messages, "max_tokens": num_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True}
    start_s, text, first_s = time.perf_counter(), "", None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content")
                if piece and first_s is None:
                    first_s = time.perf_counter() - start_s
                text += piece or ""
    return text, first_s


async def talk(client, args, number, times_s):
    "Have a conversation."
    rng = random.Random(number)
    messages = [{"role": "system", "content": words(random.Random(0), args.system_words)}]
    for i in range(args.turns):
        messages.append({"role": "user", "content": words(rng, args.words)})
        text, first_s = await turn(client, messages, args.tokens)
        messages.append({"role": "assistant", "content": text})
        if i:
            times_s.append(first_s)
        await asyncio.sleep(rng.expovariate(1 / args.pause_s))


def samples(page, name):
    "The values of a metric, by replica."
    pattern = rf'^nanollm:{name}_total{{.*replica="(\w+)".*}} (\S+)$'
    return {replica: float(value) for replica, value in re.findall(pattern, page, re.M)}


async def measure(args, url):
    "Play all conversations, so many at a time."
    times_s, waiting = [], asyncio.Semaphore(args.people)

    async def person(number):
        async with waiting:
            await talk(client, args, number, times_s)

    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        start_s = time.perf_counter()
        await asyncio.gather(*map(person, range(args.conversations)))
        elapsed_s = time.perf_counter() - start_s
        page = (await client.get("/metrics?by=replica")).text
    asked, found = (samples(page, f"prefix_cache_{name}") for name in ("queries", "hits"))
    computed = {name: asked[name] - found[name] + samples(page, "generation_tokens")[name]
                for name in asked}
    return {"hit_rate": sum(found.values()) / sum(asked.values()),
            "ttft_p50_s": statistics.median(times_s),
            "ttft_p90_s": statistics.quantiles(times_s, n=10)[-1],
            "busier_share": max(computed.values()) / sum(computed.values()),
            "seconds": elapsed_s}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--people", type=int, default=4, help="conversations at a time")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system-words", type=int, default=60)
    parser.add_argument("--words", type=int, default=80, help="of a question")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--pause-s", type=float, default=0.5, help="between turns, on average")
    args = parser.parse_args()
    report = {"replicas": args.replicas, "conversations": args.conversations,
              "turns": args.turns, "policies": {}}
    for policy in args.policies:
        server, url = start_server(args, policy)
        try:
            found = report["policies"][policy] = asyncio.run(measure(args, url))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        print(f"{policy:12} found {found['hit_rate']:.0%}, "
              f"TTFT p50 {found['ttft_p50_s']:.2f} s, "
              f"p90 {found['ttft_p90_s']:.2f} s, busier replica {found['busier_share']:.0%}",
              file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
