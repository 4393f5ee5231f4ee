#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: bench/gpu_day.sh [build|tests|bench|generate|sanitizer]...
#
# Without arguments all parts, in this order; one part at a time where time on the GPU is short. Needs torch >= 2.10
# with CUDA and the packages below; `build` needs nvcc, `sanitizer` compute-sanitizer. A step that fails or runs out of its
# time is noted, and the others go on; what rivals need may be missing. Where all parts run, each has to end in time for
# the next. At the end <date>-<gpu>.json and .md in bench/results hold what all parts so far have left in FOLDER: GPU,
# versions, commands, times, failures. Where the end does not come, `python -m bench.gpu_report FOLDER` writes them anywhere.
#   PYTHON  interpreter (python3)            FOLDER  for what the steps print (build/gpu_day)
#   BUNDLE  a .tar.gz of FOLDER and the results, written after every part: one file to take home (none)
#           Both are relative to the repository.
#   MODEL   of `generate`: smollm2, a folder, or "random" (default: the shape of Qwen2.5-1.5B, no download)
set -uo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # nvcc and compute-sanitizer are often nowhere else
PYTHON=${PYTHON:-python3}
FOLDER=${FOLDER:-build/gpu_day}
BUNDLE=${BUNDLE:-}
MODEL=${MODEL:-random}
PARTS=(build tests bench generate sanitizer)
PACKAGES=(torch transformers safetensors numpy yaml typer rich tqdm setuptools ninja pybind11 pytest hypothesis)
declare -A LATEST=([build]=160 [tests]=230 [bench]=400 [generate]=455 [sanitizer]=510)  # seconds since the start
TOTAL=510  # without the last report
end=$TOTAL # of the part that runs
mkdir -p "$FOLDER"

# step SECONDS NAME COMMAND...: standard output to FOLDER/NAME.out, errors to FOLDER/NAME.err, one line to
# FOLDER/NAME.step. At the limit an interrupt, so that a benchmark can still print what it has.
step() {
  local limit=$1 name=$2 status=0 begin=$SECONDS
  shift 2
  [ "$limit" -le $((end - SECONDS)) ] || limit=$((end - SECONDS))
  if [ "$limit" -lt 5 ]; then
    status=124
    echo "no time left" | tee "$FOLDER/$name.err" > "$FOLDER/$name.out"
  else
    timeout -s INT -k 5 "$limit" "$@" > "$FOLDER/$name.out" 2> "$FOLDER/$name.err" || status=$?
  fi
  printf '%s\t%s\t%s\n' "$status" "$((SECONDS - begin))" "$*" > "$FOLDER/$name.step"
  echo "   $name: $((SECONDS - begin)) s, exit status $status"
  [ "$status" -eq 0 ] || tail -n 8 "$FOLDER/$name.err" "$FOLDER/$name.out"
}

# For this GPU alone: half of the time of nvcc.
part_build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  step 160 build env SMARTKV_CUDA=1 SMARTKV_CUDA_ARCHS="$arch" "$PYTHON" setup.py build_ext --inplace
  step 30 machine "$PYTHON" -m bench.machine
}

# Only the folders that have GPU tests: others need packages that this machine may lack.
part_tests() {
  step 100 tests "$PYTHON" -m pytest -q -m gpu --continue-on-collection-errors --junitxml="$FOLDER/tests.xml" \
    python_tests/ops python_tests/hf/test_replay.py
}

# bench NAME ARGUMENTS...: one line of JSON in FOLDER/bench_NAME.out. Arguments start with the module.
bench() {
  local name=$1 module=$2
  shift 2
  step 45 "bench_$name" "$PYTHON" -m "bench.$module" --device cuda --seconds 0.2 --threads 8 --json "$@"
}

# The cases of the table of goals, then what is left.
part_bench() {
  local tiers=(--bits 2 --bits 302 --bits 3 --bits 403 --bits 4 --bits 8)
  bench decode_1x32k decode_attention --kv-len 32768 "${tiers[@]}" --mix --mass
  bench decode_8x32k decode_attention --kv-len 32768 --batch 8 "${tiers[@]}"
  bench compact_4 compact_kv --kv-len 32768 --bits 4
  bench quantize_4 quantize_kv --kv-len 32768 --bits 4
  bench gate_prefill gate_score --kv-len 32768 --layers 28
  bench gate_decode gate_score --kv-len 1 --layers 28
  bench select select_kv
  bench append append_kv
  bench dequantize_4 dequantize_kv --kv-len 32768 --bits 4
  bench mass attention_mass --lse
  bench merge merge_states
  bench basis change_basis
}

# The last is a rival of which not every machine has the package.
part_generate() {
  step 120 generate "$PYTHON" -m bench.generate --device cuda --model "$MODEL" --dtype bfloat16 --context 8192 \
    --tokens 128 --limit 10 --cache dynamic --cache smartkv:0.125 --cache smartkv-graph:0.125 --cache quanto:4 --json
}

# One small case of each op: a sanitizer makes kernels ten to a hundred times as slow. A tool takes an even share of the
# time where this part runs alone, and 35 s where the others have run before.
part_sanitizer() {
  local tool share left=3
  local cases='(test_pages or test_append or test_decode_attention) and 64 or test_scores'
  for tool in memcheck racecheck initcheck; do
    share=$(((end - SECONDS) / left))
    left=$((left - 1))
    [ "$share" -gt 35 ] || share=35
    step "$share" "sanitizer_$tool" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 7 \
      "$PYTHON" -m pytest -q -x -m gpu -k "$cases" python_tests/ops/test_op_devices.py
  done
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${PARTS[@]}")
for part in "${parts[@]}"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || {
    echo "unknown part '$part'; parts are ${PARTS[*]}" >&2
    exit 2
  }
done
check='import sys; from importlib.util import find_spec; missing = [x for x in sys.argv[1:] if not find_spec(x)]; '
check+='raise SystemExit("missing Python packages: " + " ".join(missing) if missing else 0)'
"$PYTHON" -c "$check" "${PACKAGES[@]}" || exit 1
"$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "torch sees no CUDA device here")' || exit 1
bundle() {
  [ -z "$BUNDLE" ] || tar -czf "$BUNDLE" "$FOLDER" bench/results
}

for part in "${parts[@]}"; do
  echo "== $part"
  [ ${#parts[@]} -lt ${#PARTS[@]} ] || end=${LATEST[$part]}
  "part_$part"
  bundle
  ls smartkv_ext/_C*.so > /dev/null 2>&1 || {
    echo "there is no smartkv_ext/_C.abi3.so: nothing else can run before \`build\` succeeds" >&2
    exit 1
  }
done
status=0
"$PYTHON" -m bench.gpu_report "$FOLDER" || status=$?
bundle || status=$?
exit "$status"
