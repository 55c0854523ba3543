#!/usr/bin/env bash
# GPU checks and benchmarks on a machine with a CUDA device and no network. One command, safe to repeat: finished
# stages are skipped, an interrupted one goes on where it stopped.
#
#   bench/gpu.sh [NAME]
#
# Results: $OUT, or bench/results/gpu-NAME (NAME: the GPU's name). Time: $LOWBIT_GPU_SECONDS, 540 by default.
# The tuned database is in $OUT/tuning; its file in $OUT/tuning/shipped belongs into codegen/tune/data, to be shipped.
# Pure-Python wheels the machine lacks (xdsl and what it needs): $LOWBIT_WHEELS, or bench/wheels/; fill it with
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d bench/wheels xdsl immutabledict ordered-set
# $PYTHON chooses the interpreter (python3), which has torch with CUDA, triton and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS_ALL=${LOWBIT_GPU_SECONDS:-540}
END=$(($(date +%s) + SECONDS_ALL))
left() { echo $((END - $(date +%s))); }

WHEELS=${LOWBIT_WHEELS:-bench/wheels}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "$WHEELS/*.whl" >/dev/null; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$SITE
fi

NAME=${1:-$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr -cs '[:alnum:]\n' '-' | tr '[:upper:]' '[:lower:]')}
OUT=${OUT:-bench/results/gpu-${NAME:-none}}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/lowbit-triton-cache}

bench() { "$PYTHON" bench/kernels.py --out "$OUT" --seconds "$(($(left) - 5))" "$@" 2>&1 | tee -a "$OUT/log.txt"; }
# Kernels in CUDA C++ need nvcc or NVRTC; their results have a folder of their own.
cuda() {
  "$PYTHON" -c 'import sys; from lowbit.codegen.cuda.toolchain import no_compiler; sys.exit(no_compiler())' || return 0
  mkdir -p "$OUT/cuda"
  "$PYTHON" bench/kernels.py --backend cuda --out "$OUT/cuda" --tuning "$OUT/tuning" --seconds "$(($(left) - 5))" "$@" 2>&1 | tee -a "$OUT/log.txt"
  return "${PIPESTATUS[0]}"
}

gpu_tests() {
  if [ -e "$OUT/tests.json" ]; then echo "tests: already there"; return; fi
  local parallel=() passed=() status cores
  cores=$(nproc)
  "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n $((cores < 16 ? cores : 16))) # most of the time is compiling
  [ -e "$OUT/tests.passed" ] && mapfile -t passed < <(sed 's/^/--deselect=/' "$OUT/tests.passed")
  rm -f "$OUT/tests.xml"
  timeout -s INT -k 10 $(($(left) < 200 ? $(left) : 200)) "$PYTHON" -m pytest tests/gpu -q -m gpu -p no:cacheprovider "${parallel[@]}" "${passed[@]}" \
    --junitxml="$OUT/tests.xml" 2>&1 | tee -a "$OUT/log.txt" | tail -40
  status=${PIPESTATUS[0]}
  "$PYTHON" bench/junit_summary.py "$OUT/tests.xml" "$status" "$OUT/tests.json"
}

# The most telling parts first: does it run and is it right, then how fast, then how it compares.
bench --stage environment || [ $? -ne 2 ] || exit 2 # 2: no CUDA device
gpu_tests
cuda --stage check --stage tune --stage compare
STATUS=$?
bench --stage check --stage tune --stage compare || STATUS=$?
ls -l "$OUT"
exit $STATUS
