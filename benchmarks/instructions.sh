#!/bin/sh
# Instructions of one decode step at batch 1, counted by callgrind: benchmarks/instructions.sh [MODEL.gguf]
# The count hardly varies between runs or machines, so a regression shows even where timings are noise.
# One thread and AVX2 (valgrind knows no AVX-512); the difference of a long and a short run leaves only the steps.
set -eu
here=$(dirname "$0")
python=${PYTHON:-"$here/../.venv/bin/python"}
model=${1:-$("$python" -m mnemos pull smollm2-135m)}

count() {
    log=$(MNEMOS_ISA=avx2 PYTHONHASHSEED=0 taskset -c 0 valgrind --tool=callgrind --callgrind-out-file=/dev/null \
        "$python" "$here/decode_steps.py" "$model" "$1" 2>&1) || { printf '%s\n' "$log" >&2; exit 1; }
    printf '%s\n' "$log" | sed -n 's/.*Collected : \([0-9]*\).*/\1/p'
}

short=$(count 4)
long=$(count 12)
echo "$(((long - short) / 8)) instructions a decode step (20 to 28 tokens of context, one thread, AVX2)"
