#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: bench/gpu_day.sh [build|tests|sanitizer|bench|generate]...
#
# Without arguments all parts, in this order; one part at a time where time on the GPU is short. Needs torch >= 2.10
# with CUDA; `build` needs nvcc, ninja and pybind11, `sanitizer` compute-sanitizer. A step that fails or runs out of its
# time is noted, and the others go on. At the end bench/results/<date>-<gpu>.json and .md hold what all parts so far
# have left in OUT: GPU, versions, commands, times, failures.
#   PYTHON  interpreter                      OUT    folder for what the steps print (build/gpu_day)
#   MODEL   of `generate`: smollm2, a folder, or "random" (default: the shape of Qwen2.5-1.5B, no download)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-build/gpu_day}
MODEL=${MODEL:-random}
TOTAL=530  # seconds for everything
PARTS=(build tests sanitizer bench generate)
mkdir -p "$OUT"

# step SECONDS NAME COMMAND...: standard output to OUT/NAME.out, errors to OUT/NAME.err, one line to OUT/NAME.step.
step() {
  local limit=$1 name=$2 status=0 begin=$SECONDS
  shift 2
  [ "$limit" -le $((TOTAL - SECONDS)) ] || limit=$((TOTAL - SECONDS > 1 ? TOTAL - SECONDS : 1))
  timeout -k 5 "$limit" "$@" > "$OUT/$name.out" 2> "$OUT/$name.err" || status=$?
  printf '%s\t%s\t%s\n' "$status" "$((SECONDS - begin))" "$*" > "$OUT/$name.step"
  echo "   $name: $((SECONDS - begin)) s, exit status $status"
  [ "$status" -eq 0 ] || tail -n 5 "$OUT/$name.err" "$OUT/$name.out"
}

part_build() {
  step 170 build env SMARTKV_CUDA=1 "$PYTHON" setup.py build_ext --inplace
}

part_tests() {
  step 70 tests "$PYTHON" -m pytest -q -m gpu --junitxml="$OUT/tests.xml" python_tests
}

# One small case of each op: a sanitizer makes kernels ten to a hundred times as slow.
part_sanitizer() {
  local tool
  local cases='(test_pages or test_append or test_decode_attention) and 64 or test_scores'
  for tool in memcheck racecheck initcheck; do
    step 35 "sanitizer_$tool" compute-sanitizer --tool "$tool" --error-exitcode 7 \
      "$PYTHON" -m pytest -q -x -m gpu -k "$cases" python_tests/ops/test_op_devices.py
  done
}

# bench NAME ARGUMENTS...: one line of JSON in OUT/bench_NAME.out. Arguments start with the module.
bench() {
  local name=$1 module=$2
  shift 2
  step 40 "bench_$name" "$PYTHON" -m "bench.$module" --device cuda --seconds 0.2 --threads 8 --json "$@"
}

# The cases of the table of goals, then what is left.
part_bench() {
  local tiers=(--bits 2 --bits 3 --bits 4 --bits 8)
  bench decode_1x32k decode_attention --kv-len 32768 "${tiers[@]}" --mix --mass
  bench decode_8x32k decode_attention --kv-len 32768 --batch 8 "${tiers[@]}"
  bench gate_prefill gate_score --kv-len 32768 --layers 28
  bench gate_decode gate_score --kv-len 1 --layers 28
  bench quantize_4 quantize_kv --kv-len 32768 --bits 4
  bench compact_4 compact_kv --kv-len 32768 --bits 4
  bench append append_kv
  bench dequantize_4 dequantize_kv --kv-len 32768 --bits 4
  bench mass attention_mass --lse
  bench select select_kv
  bench merge merge_states
}

part_generate() {
  step 60 generate "$PYTHON" -m bench.generate --device cuda --model "$MODEL" --dtype bfloat16 \
    --context 8192 --tokens 32 --cache dynamic --cache quanto:4 --cache smartkv:0.125 --json
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${PARTS[@]}")
for part in "${parts[@]}"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || {
    echo "unknown part '$part'; parts are ${PARTS[*]}" >&2
    exit 2
  }
done
"$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "torch sees no CUDA device here")' || exit 1
for part in "${parts[@]}"; do
  echo "== $part"
  "part_$part"
done
"$PYTHON" -m bench.gpu_report "$OUT"
