#!/usr/bin/env bash
# What needs a GPU: the tests that use one, the oracle among them, and the benchmarks, with
# random weights in the shape of Qwen3-0.6B. Takes a folder for what it finds, and perhaps the
# scenarios of benchmark_engine.py that are wanted.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder}
shift
scenarios=${*:-one equal ragged sampled prefix shared long-prompt speculative lora}
export PYTHONPATH=.:${PYTHONPATH:-} TOKENIZERS_PARALLELISM=false
shape="--model qwen3-0.6b --load-format dummy --device cuda --dtype bfloat16"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"

tests="test_oracle test_sampling test_engine test_structured_output test_speculative test_lora"
OMP_NUM_THREADS=1 timeout 240 python3 -m pytest -q -n 8 --dist loadfile \
    $(printf 'tests/%s.py ' $tests) > "$out/tests.txt" 2>&1
tail -n 30 "$out/tests.txt"

for scenario in $scenarios; do
    timeout 90 python3 benchmarks/benchmark_engine.py $shape --runs 3 --scenarios "$scenario" \
        --budget 1024 --skip-generate-batch 2>> "$out/engine.log" | tee -a "$out/engine.jsonl" | cut -c 1-1500
done
tail -n 20 "$out/engine.log" | cut -c 1-300
timeout 90 python3 benchmarks/benchmark_server.py $shape --kv-cache-memory 4GiB --threads 4 \
    --prompt-tokens 128 --output-tokens 128 2> "$out/server.log" > "$out/server.json"
tail -n 15 "$out/server.log" | cut -c 1-300
