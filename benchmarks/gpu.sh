#!/usr/bin/env bash
# Builds torch_fff for the GPU of this machine, tests it there and measures it, in 9 minutes at most.
#
#   benchmarks/gpu.sh [FOLDER]    report, tables and plots go to FOLDER, by default benchmarks/results
#
# Needs torch with CUDA, nvcc, cmake, ninja, pybind11, setuptools and pytest, and no network. What
# was found until a stage ran out of its time is kept. PYTHON, TORCH_CUDA_ARCH_LIST and CUDACXX may
# name others than what is found. The exit status is 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

results=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd) || exit 1
python=${PYTHON:-python3}
site=$(mktemp -d) || exit 1
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
status=0

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  printf '\n=== %s, at most %s s\n' "$name" "$limit"
  timeout --kill-after=10 "$limit" "$@" || code=$?
  ((code == 0)) || status=1
  printf '=== %s: %s s, exit status %s\n' "$name" $((SECONDS - begin)) "$code"
  return "$code"
}

describe='import torch
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}")'
"$python" -c "$describe" || { echo "needs a GPU and a torch with CUDA" >&2; exit 1; }
compute='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "$compute")} FORCE_CUDA=1

stage build 180 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps \
    --target "$site" . || exit 1
stage kernels 30 "$python" -m benchmarks kernels "$site/torch_fff/lib/libtorch_fff.so"

# Tests that need no more than pytest; the most telling ones first.
names=(cuda tree descend leaf_mixture gated_activation soft_tree autocast fff ultra_fff alternates
  errors losses prune training transforms compile)
if "$python" -c 'import expecttest' 2>/dev/null; then
  names+=(opcheck)
fi
tests=("${names[@]/#/tests/python/test_}")
stage tests 110 "$python" -m pytest -q --maxfail=30 -k '[cuda' -p no:cacheprovider "${tests[@]/%/.py}"

sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)
if [ "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    # Only kernels of ours, whose names contain that. The caching allocator would hide accesses
    # beyond a tensor but within its block.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 50 "$sanitizer" --tool "$tool" --kernel-name kns=3fff \
        --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider tests/python/test_tree.py \
        -k '[cuda and test_equals_reference and plain' 2>&1 | tail -15 || status=1
  done
else
  echo "=== compute-sanitizer: not installed"
fi

# Training gets what forward leaves.
measure() {
  local suite=$1 limit=$2
  stage "$suite" "$limit" "$python" -m benchmarks run "$suite" --device cuda \
      --seconds $((limit * 8 / 10)) --out "$results/$suite.json"
}
measure gpu-forward $(((510 - SECONDS) / 2))
measure gpu-training $((510 - SECONDS))

reports=()
for suite in gpu-forward gpu-training; do
  [ -f "$results/$suite.json" ] && reports+=("$results/$suite.json")
done
if ((${#reports[@]})); then
  "$python" -m benchmarks table "${reports[@]}" >"$results/gpu.md" || status=1
  "$python" -m benchmarks plot "${reports[@]}" --out "$results" || echo "no plots: needs matplotlib"
fi
printf '\nall: %s s, exit status %s\n' "$SECONDS" "$status"
exit "$status"
