"""Measure what HTTP costs: the same requests offline, and as streams to a server, in turns.

The server has a process of its own; the client, which reads bytes and counts at the end, shares
one with the offline engine, which waits meanwhile. The goal is at most 5 % below the offline
engine at 16 streams. For each dtype there is a line on stderr with the medians, their ratio,
the lowest and highest ratio of neighbours, and the goal; the last line of stdout is one JSON
object with all of it. See nbs/29_server.ipynb.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time

import torch

from nanollm import LLM, SamplingParams
from nanollm.measure import device_name

GOAL = 0.95  # of the offline engine's speed


def start_server(args, dtype):
    "Start `nanollm-serve` on a free port; return the process and the port."
    command = [
        sys.executable,
        "-c",
        "from nanollm.serve.cli import serve_main; serve_main()",
        "--port",
        "0",
        "--no-log-requests",
        "--no-enable-prefix-caching",
    ]
    options = {
        "--model": args.model,
        "--load-format": args.load_format,
        "--dtype": dtype,
        "--device": args.device,
        "--threads": str(args.threads),
        "--kv-cache-memory": args.kv_cache_memory,
    }
    command += [
        word for name, value in options.items() if value is not None for word in (name, value)
    ]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    for line in server.stderr:
        if found := re.search(r"on http://\S+:(\d+)", line):
            return server, int(found[1])
    raise SystemExit(f"the server has ended with exit code {server.wait()}")


async def stream(port, prompt_ids, num_tokens):
    "Send one streaming completion; return the number of its output tokens."
    fields = {
        "prompt": prompt_ids,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await reader.read()  # takes each event as it comes
    writer.close()
    return int(re.findall(rb'"completion_tokens":(\d+)', answer)[-1])


async def over_http(port, prompts, num_tokens):
    "Run all prompts as concurrent streams; return output tokens per second."
    start = time.perf_counter()
    made = await asyncio.gather(
        *(stream(port, prompt_ids, num_tokens) for prompt_ids in prompts)
    )
    return sum(made) / (time.perf_counter() - start)


def offline(llm, prompts, num_tokens):
    "Run all prompts with `LLM.generate`; return output tokens per second."
    start = time.perf_counter()
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (
        time.perf_counter() - start
    )


def summary(speeds):
    "Return the medians, their ratio, and the ratio of each run over HTTP to its neighbour."
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["http"] / medians["offline"]
    return {
        **{f"{name}_tokens_per_s": speed for name, speed in medians.items()},
        "http_over_offline": ratio,
        "pairs": [http / alone for http, alone in zip(speeds["http"], speeds["offline"])],
        "goal_met": ratio >= GOAL,
    }


def line_of(result):
    "Return a summary as one line."
    speeds = (f"{name} {result[f'{name}_tokens_per_s']:.1f}" for name in ("offline", "http"))
    return (
        f"median output tok/s: {', '.join(speeds)}; http / offline "
        f"{result['http_over_offline']:.3f} (pairs {min(result['pairs']):.3f} to "
        f"{max(result['pairs']):.3f}); goal {GOAL}: {'met' if result['goal_met'] else 'missed'}"
    )


def compare(args, dtype):
    "Run all requests offline and over HTTP, in turns; return the speeds."
    llm = LLM(
        args.model,
        load_format=args.load_format,
        dtype=dtype,
        device=args.device,
        kv_cache_memory=args.kv_cache_memory,
        progress=False,
        enable_prefix_caching=False,
    )
    draw, vocab_size = random.Random(0), llm.model.get_input_embeddings().num_embeddings
    prompts = [
        [draw.randrange(vocab_size // 50, vocab_size) for _ in range(args.prompt_tokens)]
        for _ in range(args.num_streams)
    ]
    server, port = start_server(args, dtype)
    cases = {
        "offline": lambda: offline(llm, prompts, args.output_tokens),
        "http": lambda: asyncio.run(over_http(port, prompts, args.output_tokens)),
    }
    speeds = {name: [] for name in cases}
    try:
        for run in range(args.runs + 1):  # the first warms up
            for name in sorted(cases, reverse=bool(run % 2)):
                speed = cases[name]()
                print(f"{dtype} run {run} {name}: {speed:.1f} output tok/s", file=sys.stderr)
                speeds[name] += [speed] if run else []
    finally:
        server.terminate()
        server.wait()
    result = summary(speeds)
    print(f"{dtype}: {line_of(result)}", file=sys.stderr)
    return {"device": device_name(llm.model.device), **result}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="as for nanollm-serve; by default the default model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument(
        "--dtype", choices=["both", "float32", "bfloat16", "float16"], default="both"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the engine")
    parser.add_argument(
        "--kv-cache-memory", help="of each of the two engines; on a GPU, which they share"
    )
    parser.add_argument("--num-streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]
    print(
        json.dumps(vars(args) | {"results": {dtype: compare(args, dtype) for dtype in dtypes}})
    )


if __name__ == "__main__":
    main()
