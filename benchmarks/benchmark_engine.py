"""Measure the engine against transformers, and against itself without each technique.

Every scenario runs its cases in turns in one process, on the same work, and reports medians;
the last line of stdout is one JSON object. See nbs/26_benchmark.ipynb.
"""

import argparse
import copy
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from nanollm import SamplingParams, encode, encode_chat, load_tokenizer
from nanollm.args import EngineArgs
from nanollm.llm import adapters_of, make_engine
from nanollm.measure import device_name, interleave, percentile
from nanollm.model import DEFAULT_MODEL, kv_bytes_per_token, load_model, max_context
from nanollm.request import RequestEvent, StepRecord
from nanollm.sampling import DEFAULT_PROCESSORS, on_device
from nanollm.static_batching import pad_left


def load(model, num_requests, prompt_tokens, output_tokens, seed=0):
    "Random prompts and output lengths: a list of (prompt ids, number of output tokens)."
    draw, vocab_size = random.Random(seed), model.get_input_embeddings().num_embeddings
    return [
        (
            [
                draw.randrange(vocab_size // 50, vocab_size)
                for _ in range(draw.randint(*prompt_tokens))
            ],
            draw.randint(*output_tokens),
        )
        for _ in range(num_requests)
    ]


def greedy(max_tokens, **more):
    return SamplingParams(
        **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True} | more
    )


def build(model, args, processors=DEFAULT_PROCESSORS, **options):
    usual = {
        "num_kv_blocks": 16384 // 16,
        "enable_prefix_caching": False,
        "model_impl": args.model_impl,
        "enable_kernels": args.kernels == "on",
    }
    return make_engine(EngineArgs(**usual | options), model, processors=processors)


def engine_run(engine, work, later=(), after=0, adapters=(None,), **params):
    "Run requests, those in `later` from step `after` on; return seconds, and them in order."
    done, start, step = [], time.perf_counter(), 0

    def watch(event):
        if isinstance(event, RequestEvent) and event.kind == "finished":
            done.append(event.request)

    engine.listeners.append(watch)
    for i, (prompt_ids, num) in enumerate(work):
        engine.add_request(
            prompt_ids,
            greedy(num, **params),
            request_id=f"r{i:04}",
            adapter=adapters[i % len(adapters)],
        )
    while engine.has_unfinished:
        if step == after:
            for i, (prompt_ids, num) in enumerate(later):
                engine.add_request(prompt_ids, greedy(num), request_id=f"s{i:04}")
        engine.step()
        step += 1
    engine.listeners.remove(watch)
    return time.perf_counter() - start, sorted(done, key=lambda request: request.request_id)


def generate_run(model, work, temperature=0, top_p=1.0, seed=0):
    "transformers' `generate` on one batch, padded on the left, as long as the longest answer."
    ids, mask, _ = pad_left([prompt_ids for prompt_ids, _ in work], model.device)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(seed)
    config = GenerationConfig(
        max_new_tokens=max(num for _, num in work),
        pad_token_id=0,
        **(drawn if temperature else {"do_sample": False}),
    )
    own, model.generation_config = model.generation_config, GenerationConfig()
    start = time.perf_counter()
    try:
        out = model.generate(ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = own
    rows = out[:, ids.shape[1] :].tolist()
    return time.perf_counter() - start, [row[:num] for row, (_, num) in zip(rows, work)]


def continuous_run(model, work):
    "transformers' own continuous batching, with each request's own length."
    longest = max(num for _, num in work)
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    before, found = model.config._attn_implementation, {}
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with model.continuous_batching_context_manager(
            generation_config=config, block=True, timeout=5
        ) as manager:
            start = time.perf_counter()
            for i, (prompt_ids, num) in enumerate(work):
                manager.add_request(prompt_ids, request_id=str(i), max_new_tokens=num)
            while len(found) < len(work):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[int(result.request_id)] = result.generated_tokens
            seconds = time.perf_counter() - start
    finally:
        model.generation_config = own
        model.set_attn_implementation(before)
    return seconds, [found[i] for i in range(len(work))]


def against_transformers(model, work, args, names):
    "Output tokens per second of the engine and of transformers on the same work."
    engine = build(model, args)
    cases = {
        "engine": lambda: engine_run(engine, work),
        "generate": lambda: generate_run(model, work),
        "generate_batch": lambda: continuous_run(model, work),
    }
    results = interleave({name: cases[name] for name in names}, args.runs, args.warmup)
    num_tokens = sum(num for _, num in work)
    report = {
        name: {
            "tokens_per_s": num_tokens / statistics.median(seconds for seconds, _ in runs),
            "seconds": [seconds for seconds, _ in runs],
        }
        for name, runs in results.items()
    }
    ours = [request.output_ids for request in results["engine"][0][1]]
    speed = {name: case["tokens_per_s"] for name, case in report.items()}
    report |= {f"engine_over_{name}": speed["engine"] / speed[name] for name in names[1:]}
    report |= {
        f"same_tokens_as_{name}": sum(a == b for a, b in zip(ours, results[name][0][1]))
        for name in names[1:]
    }
    timings = [request.timing for _, done in results["engine"] for request in done]
    return report | {
        "num_requests": len(work),
        "output_tokens": num_tokens,
        "engine_mean_tpot_s": statistics.fmean(
            timing.tpot_s for timing in timings if timing.num_tokens > 1
        ),
    }


def one(model, args):
    return against_transformers(
        model, load(model, 1, (64, 64), (64, 64)), args, ["engine", "generate"]
    )


def equal(model, args):
    return against_transformers(
        model, load(model, 16, (128, 128), (64, 64)), args, ["engine", "generate"]
    )


def ragged(model, args):
    work = load(model, 16, (16, 512), (16, 128))
    names = ["engine", "generate", "generate_batch"]
    return against_transformers(model, work, args, names[: 3 - args.skip_generate_batch])


def prefix(model, args):
    "One prefix of 512 tokens, 32 short suffixes: TTFT with and without the prefix cache."
    (shared, _), suffixes = (
        load(model, 1, (512, 512), (1, 1))[0],
        load(model, 32, (8, 24), (8, 8), seed=1),
    )
    work = [(shared + suffix, num) for suffix, num in suffixes]
    engines = {
        name: build(model, args, enable_prefix_caching=on, num_kv_blocks=2048)
        for name, on in (("cached", True), ("computed", False))
    }

    def run(engine):
        if hasattr(engine.scheduler.cache, "reset"):
            engine.scheduler.cache.reset()
        return engine_run(engine, work)

    cases = {name: lambda engine=engine: run(engine) for name, engine in engines.items()}
    results = interleave(cases, args.runs, args.warmup)
    ttft = {
        name: statistics.median(
            percentile([r.timing.ttft_s for r in done], 50) for _, done in runs
        )
        for name, runs in results.items()
    }
    same = [r.output_ids for r in results["cached"][0][1]] == [
        r.output_ids for r in results["computed"][0][1]
    ]
    return {
        "ttft_p50_s": ttft,
        "speedup": ttft["computed"] / ttft["cached"],
        "same_tokens": same,
        "cached_tokens": sum(r.num_cached_tokens for r in results["cached"][0][1]),
        "prompt_tokens": sum(r.num_prompt_tokens for r in results["cached"][0][1]),
    }


def sampled(model, args):
    "16 rows drawn with temperature 0.8 and top_p 0.95, or greedily: seconds per step."
    work, engine = load(model, 16, (128, 128), (64, 64)), build(model, args)
    kinds = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 7}}
    cases = {
        name: lambda params=params: engine_run(engine, work, **params)
        for name, params in kinds.items()
    }
    results = interleave(cases, args.runs, args.warmup)
    tpot = {
        name: statistics.median(
            statistics.median(r.timing.tpot_s for r in done) for _, done in runs
        )
        for name, runs in results.items()
    }
    rows = [[r.output_ids for r in done] for _, done in results["sampled"]]
    return {
        "median_tpot_s": tpot,
        "sampling_s_per_step": tpot["sampled"] - tpot["greedy"],
        "same_tokens_in_all_runs": all(row == rows[0] for row in rows),
    }


def shared(model, args):
    "8 prompts with one prefix of 256 tokens, budget 4,096: tokens of the first step."
    (prefix, _), suffixes = (
        load(model, 1, (256, 256), (1, 1))[0],
        load(model, 8, (14, 14), (1, 1), seed=1),
    )
    work, found = [(prefix + suffix, num) for suffix, num in suffixes], {}
    for name, on in (("cached", True), ("computed", False)):
        engine, steps = (
            build(model, args, enable_prefix_caching=on, max_num_batched_tokens=4096),
            [],
        )
        engine.listeners.append(
            lambda event, steps=steps: (
                steps.append(event) if isinstance(event, StepRecord) else None
            )
        )
        _, done = engine_run(engine, work)
        found[name] = {
            "tokens_in_first_step": sum(one.num_new for one in steps[0].works),
            "steps": len(steps),
            "first_tokens": [r.output_ids for r in done],
        }
    same = found["cached"].pop("first_tokens") == found["computed"].pop("first_tokens")
    return found | {"prompt_tokens": sum(len(ids) for ids, _ in work), "same_tokens": same}


def long_prompt(model, args):
    "A prompt of 4,000 tokens arrives among 8 decodes: their largest gap between two tokens."
    decodes, later = (
        load(model, 8, (32, 32), (48, 48)),
        load(model, 1, (4000, 4000), (4, 4), seed=1),
    )
    engines = {
        "chunked": build(model, args, max_num_batched_tokens=args.budget),
        "whole": build(model, args, max_num_batched_tokens=4096, enable_chunked_prefill=False),
    }
    cases = {
        name: lambda engine=engine: engine_run(engine, decodes, later, 8)
        for name, engine in engines.items()
    }
    results = interleave(cases, args.runs, 0)
    largest = {
        name: statistics.median(max(max(r.timing.itl_s) for r in done[:8]) for _, done in runs)
        for name, runs in results.items()
    }
    ttft = {
        name: statistics.median(done[8].timing.ttft_s for _, done in runs)
        for name, runs in results.items()
    }
    same = [r.output_ids for r in results["chunked"][0][1]] == [
        r.output_ids for r in results["whole"][0][1]
    ]
    return {
        "largest_itl_s": largest,
        "ratio": largest["whole"] / largest["chunked"],
        "ttft_of_the_long_prompt_s": ttft,
        "budget": args.budget,
        "same_tokens": same,
    }


def memory(model, args):
    "KV bytes reserved per live token, a slot per request or blocks. Nothing is computed."
    per_token, context = kv_bytes_per_token(model.config, model.dtype), max_context(model)
    work, found = load(model, 64, (16, 512), (16, 128)), {}
    for size in (context, 256, 64, 16, 1):
        reserved = live = 0
        for prompt_ids, num in work:
            for num_tokens in range(len(prompt_ids), len(prompt_ids) + num):
                reserved, live = reserved + -(-num_tokens // size) * size, live + num_tokens
        found["slot" if size == context else f"block_{size}"] = per_token * reserved / live
    return {"kv_bytes_per_token": per_token, "reserved_bytes_per_live_token": found}


NAMES = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karla Lukas".split()
TOWNS = "Paris Rome Oslo Cairo Lima Delhi Quito Tokyo Kyoto Sofia Riga Bern".split()


def edits(tokenizer, num):
    "Texts with one name changed, whose answers are mostly in the prompt, and an example."
    texts = (
        "{0} lives in {1} and works in a small library near the river. Every morning {0} "
        "walks along the water, buys a loaf of bread, and opens the doors at nine.",
        "At {1} the train was late again. {0} sat down on the bench, opened a book about "
        "birds, and read until the lamps were lit and the last children had gone home.",
    )
    found = []
    for i in range(num):
        old, new = NAMES[i % 12], NAMES[(i + 5) % 12]
        towns = TOWNS[i % 12], TOWNS[(i + 3) % 12]
        first, second = (text.format("{0}", town) for text, town in zip(texts, towns))
        prompt = f"Text:\n{first.format(old)}\n\nWith {new} instead of {old}:\n"
        prompt += f"{first.format(new)}\n\nText:\n{second.format(new)}\n\n"
        found.append(encode(tokenizer, prompt + f"With {old} instead of {new}:\n"))
    return found


def stories(tokenizer, num):
    "Questions whose answers are in no text."
    questions = [
        f"Write a short story about {NAMES[i % 12]}, who finds a door in {TOWNS[i * 5 % 12]}."
        for i in range(num)
    ]
    return [encode_chat(tokenizer, [{"role": "user", "content": q}]) for q in questions]


def copied(logits, rows):
    "Let a model of random weights copy its prompt, with every 24th token another one."
    wanted = [
        (row.prompt_ids[row.position % len(row.prompt_ids)] + (row.position % 24 == 23))
        % logits.shape[-1]
        for row in rows
    ]
    logits.scatter_(1, on_device(wanted, logits.device)[:, None], 1e4)


def speculative(model, args):
    "Edits (greedy) and stories (drawn), one stream and 16, with n-gram drafts and without."
    asked = {"method": "ngram", "num_speculative_tokens": 7}
    asked |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    drawn = {"temperature": 0.8, "seed": 7}
    tasks = {"edit": (edits, {}), "story": (stories, drawn)}
    report = {"speculative_config": asked}
    for task, (make, params) in tasks.items():
        dummy = args.load_format == "dummy"
        more = (copied,) if dummy and task == "edit" else ()
        engines = {
            name: build(model, args, (*DEFAULT_PROCESSORS, *more), speculative_config=config)
            for name, config in (("none", None), ("ngram", asked))
        }
        for num in (1, 16):
            if dummy:
                work = load(model, num, (96, 96), (96, 96))
            else:
                tokenizer = load_tokenizer(args.model)
                work = [(ids, 96) for ids in make(tokenizer, num)]
            cases = {
                name: lambda engine=engine, work=work, params=params: counted_run(
                    engine, work, ignore_eos=False, **params
                )
                for name, engine in engines.items()
            }
            report[f"{task}_{num}"] = against_none(interleave(cases, args.runs, args.warmup))
    return report


def counted_run(engine, work, **params):
    "Seconds, requests, steps, and drafts with how many were right."
    steps = []
    engine.listeners.append(steps.append)
    seconds, done = engine_run(engine, work, **params)
    engine.listeners.remove(steps.append)
    works = [one for step in steps if isinstance(step, StepRecord) for one in step.works]
    num_steps = sum(isinstance(step, StepRecord) for step in steps)
    drafts = sum(one.num_drafts for one in works), sum(one.num_accepted for one in works)
    return seconds, done, num_steps, drafts


def against_none(results):
    "Condense the runs of `counted_run`, and divide what drafts cost by what none cost."
    report, answers, per_token = {}, {}, {}
    for name, runs in results.items():
        answers[name] = [request.output_ids for request in runs[-1][1]]
        per_token[name] = [
            seconds / sum(len(request.output_ids) for request in done)
            for seconds, done, *_ in runs
        ]
        report[name] = {
            "s_per_token": statistics.median(per_token[name]),
            "tokens_per_step": sum(map(len, answers[name])) / runs[-1][2],
            "drafts": runs[-1][3][0],
            "accepted": runs[-1][3][1],
        }
    ratios = [a / b for a, b in zip(per_token["ngram"], per_token["none"])]
    same = sum(a == b for a, b in zip(answers["ngram"], answers["none"]))
    return report | {
        "time_per_token_over_none": statistics.median(ratios),
        "ratios": ratios,
        "same_answers": f"{same} of {len(answers['none'])}",
    }


def random_adapter(model, folder, rank, seed):
    "Write an adapter of all linear layers but the head, in peft's format."
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            size = module.in_features, module.out_features
            down = torch.randn(rank, size[0], generator=draw) / size[0] ** 0.5
            up = torch.randn(size[1], rank, generator=draw) / 20
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    kind = {"peft_type": "LORA", "target_modules": "all-linear"}
    config = kind | {"r": rank, "lora_alpha": rank}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def lora(model, args):
    "16 requests over 0, 1, 4 and 8 adapters of rank 16, and an engine that knows of none."
    work, plain = load(model, 16, (64, 64), (48, 48)), build(model, args)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"a{i}" for i in range(8)]
        for i, name in enumerate(names):
            random_adapter(model, Path(folder) / name, 16, seed=i)
        engine = build(copy.deepcopy(model), args, enable_lora=True, max_loras=8)
        adapters = adapters_of(engine, EngineArgs(enable_lora=True))
        digests = [adapters.load(name, f"{folder}/{name}") for name in names]
    cases = {"without": lambda: engine_run(plain, work)}
    for num in (0, 1, 4, 8):
        # with one adapter and more, a row of the base model as well
        own = [None, *digests[:num]]
        cases[str(num)] = lambda own=own: engine_run(engine, work, adapters=own)
    results = interleave(cases, args.runs, args.warmup)
    report = {}
    for name, runs in results.items():
        ratios = [a / b for (a, _), (b, _) in zip(runs, results["without"])]
        report[name] = {
            "tokens_per_s": sum(num for _, num in work)
            / statistics.median(seconds for seconds, _ in runs),
            "time_over_without": statistics.median(ratios),
        }
    base = [request.output_ids for request in results["without"][0][1]]
    for name, runs in results.items():
        found = [request.output_ids for request in runs[0][1]]
        step = int(name) + 1 if name.isdigit() else 1
        report[name]["same_base_rows"] = found[::step] == base[::step]
    return report


PREFIX = 512  # tokens that the requests of `prefix` have in common


def loads(model, seed):
    "The loads of `formats` by name, with new prompts for each seed: work, and its sampling."
    shared = load(model, 1, (PREFIX, PREFIX), (1, 1))[0][0]  # always the same
    suffixes = load(model, 32, (8, 24), (8, 8), seed)
    sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
    return {
        "one": (load(model, 1, (64, 64), (64, 64), seed), {}),
        "8 equal": (load(model, 8, (128, 128), (64, 64), seed), {}),
        "16 equal": (load(model, 16, (128, 128), (64, 64), seed), {}),
        "32 equal": (load(model, 32, (128, 128), (32, 32), seed), {}),
        "16 ragged": (load(model, 16, (16, 512), (16, 128), seed), {}),
        "16 sampled": (load(model, 16, (128, 128), (64, 64), seed), sampling),
        "prefill": (load(model, 1, (1024, 1024), (1, 1), seed), {}),
        "prefix": ([(shared + suffix, num) for suffix, num in suffixes], {}),
    }


class OtherEngine:
    "Another engine in a process of its own; see benchmarks/other_engines.py."

    def __init__(self, name, python, model, dtype):
        script = Path(__file__).with_name("other_engines.py")
        options = ["--model", model, "--dtype", dtype, "--threads"]
        options += [str(torch.get_num_threads())]
        options += ["--enable-prefix-caching"] * (name == "vllm")
        self.process = subprocess.Popen(
            [python, str(script), name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, work, sampling):
        asked = {"prompts": [ids for ids, _ in work], "max_tokens": [num for _, num in work]}
        usual = {"name": "", "temperature": 0, "top_p": 1, "ignore_eos": True}
        self.process.stdin.write(json.dumps(usual | sampling | asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def formats(model, args):
    "The same loads in each format of the weights, and in other engines: tokens per second."
    others, runners = [], {}
    for case in args.formats:
        kind, _, cache = case.partition("+")
        options = {} if kind in ("plain", "off") else {"quantization": kind}
        options |= {"kv_cache_dtype": cache} if cache else {}
        own = model if kind in ("plain", "off") else copy.deepcopy(model)
        engine = build(
            own, args, enable_prefix_caching=True, enable_kernels=kind != "off", **options
        )
        runners[case] = lambda work, more, engine=engine: engine_run(engine, work, **more)[0]
    if not args.skip_generate:
        runners["generate"] = lambda work, more: generate_run(model, work, **more)[0]
    for name, python, path in args.other:
        others.append(OtherEngine(name, python, path, str(model.dtype).removeprefix("torch.")))
        runners[name] = others[-1].run
    report, rounds = {}, args.warmup + args.runs
    works = [loads(model, seed) for seed in range(1, rounds + 1)]
    for name in args.loads or works[0]:
        seconds = {case: [] for case in runners}
        for i, work in enumerate(works):
            turn = list(runners)
            for case in turn[i % len(turn) :] + turn[: i % len(turn)]:
                seconds[case].append(runners[case](*work[name]))
        whole = name == "prefill"
        num = [sum(len(ids) if whole else n for ids, n in work[name][0]) for work in works]
        speed = {
            case: [n / s for n, s in zip(num, found)][args.warmup :]
            for case, found in seconds.items()
        }
        report[name] = {
            case: {"tokens_per_s": statistics.median(found), "runs": found}
            for case, found in speed.items()
        }
        medians = {case: round(row["tokens_per_s"], 1) for case, row in report[name].items()}
        print(f"  {name}: {medians}", file=sys.stderr, flush=True)
    for other in others:
        other.close()
    return report


SCENARIOS = {
    "formats": formats,
    "one": one,
    "equal": equal,
    "ragged": ragged,
    "sampled": sampled,
    "prefix": prefix,
    "shared": shared,
    "long-prompt": long_prompt,
    "memory": memory,
    "speculative": speculative,
    "lora": lora,
}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--scenarios",
        nargs="+",
        choices=SCENARIOS,
        default=list(SCENARIOS),
        help="default: all",
    )
    p.add_argument(
        "--model",
        help="hub id, directory, .gguf file or dummy shape; default: SmolLM2-135M-Instruct",
    )
    p.add_argument(
        "--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights"
    )
    p.add_argument(
        "--model-impl",
        choices=["auto", "nanollm", "transformers"],
        default="auto",
        help="whose forward pass (default: %(default)s)",
    )
    p.add_argument(
        "--kernels", choices=["on", "off"], default="on", help="compiled or not (default: on)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    p.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16, float16 (default: %(default)s)",
    )
    p.add_argument(
        "--threads", type=int, help="CPU threads of torch (default: torch's own choice)"
    )
    p.add_argument("--runs", type=int, default=3, help="measured rounds (default: %(default)s)")
    p.add_argument(
        "--warmup", type=int, default=1, help="rounds thrown away (default: %(default)s)"
    )
    p.add_argument(
        "--budget",
        type=int,
        default=256,
        help="tokens per step in long-prompt (default: %(default)s)",
    )
    p.add_argument(
        "--skip-generate-batch",
        action="store_true",
        help="leave transformers' own continuous batching out of ragged",
    )
    p.add_argument(
        "--formats",
        nargs="*",
        default=["off", "plain", "int8", "int8_dynamic", "int4"],
        help="of the weights, in formats: off (no kernels), plain, a quantization; perhaps "
        "with +KV_CACHE_DTYPE (default: %(default)s)",
    )
    p.add_argument("--loads", nargs="+", help="of formats (default: all)")
    p.add_argument(
        "--other",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "PYTHON", "MODEL"),
        help="another engine in formats: vllm or llama_cpp, the Python that has it, and what "
        "it loads (a directory; for llama_cpp a .gguf file); may be repeated",
    )
    p.add_argument(
        "--skip-generate", action="store_true", help="leave transformers out of formats"
    )
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = load_model(
        args.model, device=args.device, dtype=args.dtype, load_format=args.load_format
    )
    report = {
        "model": args.model or DEFAULT_MODEL,
        "hardware": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_threads": torch.get_num_threads(),
        "model_impl": args.model_impl,
        "kernels": args.kernels,
        "runs": args.runs,
        "warmup": args.warmup,
    }
    for name in args.scenarios:
        print(f"{name} ...", file=sys.stderr, flush=True)
        report[name] = SCENARIOS[name](model, args)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
