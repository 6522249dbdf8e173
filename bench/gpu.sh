#!/usr/bin/env bash
# One visit to a GPU machine: what is worth having, most valuable first, in 7 minutes.
#
#   OUT=/tmp/out bench/gpu.sh                 on a GPU; brings back $OUT/visit.tgz and $OUT/visit.txt, the summary
#   OUT=/tmp/out bench/gpu.sh                 once more: goes on with what has not come to its end
#   STEPS="bn-compile conv-gather" bench/gpu.sh   these steps only, also where they have ended before (after a repair)
#   SECONDS_IN_ALL=540 bench/gpu.sh           more time than 420 s, for steps that were cut off
#   bench/gpu.sh --plan                       names the steps and their seconds; runs nothing
#   bench/gpu.sh --rehearse                   all of it on a CPU: tiny shapes, and kernels that are called but not run
#
# Needs Python (PYTHON names another) with torch, triton, numpy, pandas, pytest: no network, nothing installed. A step is a
# process of its own with seconds of its own: one that fails, hangs or loses the GPU costs itself only. Everything is in
# $VISIT (runs/visit, kept between calls), from which the archive is renewed after each step and every 30 s: see visit.py.
# bench/README.md says what each step is for and what is lost with it. Exit code 1 unless all steps are done.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PLAN=0 REHEARSE=0
for word in "$@"; do
  case $word in
    --plan) PLAN=1 ;;
    --rehearse) REHEARSE=1 ;;
    *) echo "gpu.sh: options are --plan and --rehearse, not $word" >&2; exit 2 ;;
  esac
done

PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-420}
WORKERS=8 SHARES=${SHARES:-$(nproc)}
DEVICE=cuda SIZES=() ONE_NETWORK=() ONE_STAGE=() ONE_MAP=() COMPILE=(--compile) FAMILIES="lasso sgd bn cooperative gated index conv" COMPILED=""
FIRST="tests/ops/test_conv2d.py tests/ops/test_on_gpu.py tests/ops/test_cuda_native.py tests/ops/test_batch_norm_gated.py"
TESTS="$FIRST $(ls tests/ops/test_*.py tests/optim/test_*.py | grep -vxF "${FIRST// /$'\n'}" | xargs)"
if [ $REHEARSE = 1 ]; then  # a CPU is slow, and other work may run on it: every limit is 20 times as long
  export VISIT=${VISIT:-runs/rehearsal} SCALE=20
  SECONDS_IN_ALL=9000 WORKERS=2 SHARES=1 DEVICE=cpu SIZES=(--quick) ONE_NETWORK=(--only resnet32) ONE_STAGE=(--only layer4) ONE_MAP=(--only 64x8x8)
  COMPILE=(--no-compile)
  FAMILIES="lasso,sgd,bn,cooperative,gated,index,conv" COMPILED="channel_gather fp16 NHWC" TESTS=tests/ops/test_on_gpu.py
fi
export VISIT=${VISIT:-runs/visit}
export OUT=${OUT:-$VISIT-out} STEPS=${STEPS:-} VISIT_ENDS=$(($(date +%s) + SECONDS_IN_ALL))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PRUNETRAIN_TEST_DEVICE=$DEVICE
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/prunetrain-triton}  # a home folder may be read-only
unset TRITON_INTERPRET

shards() { for ((i = 0; i < $1; i++)); do echo -n "$i/$1 "; done; }
# step NAME SECONDS COMMAND...    with ITEMS set: one process for each of them, in place of {}, side by side
step() {
  if [ $PLAN = 1 ]; then echo "$1 $2"; return; fi
  "$PYTHON" bench/visit.py step --for "${ITEMS:-}" "$@"
}
# suites NAME SECONDS ARGUMENTS...: `python -m bench run`, rows to the visit's folder
suites() {
  local name=$1 seconds=$2
  shift 2
  step "$name" "$seconds" "$PYTHON" -m bench run "$@" --device $DEVICE "${SIZES[@]}" --out "$VISIT/rows"
}
tests() { # tests NAME SECONDS WORKERS ARGUMENTS...: pytest, a share of the tests for each worker
  local name=$1 seconds=$2 workers=$3
  shift 3
  ITEMS=$(shards "$workers") step "$name" "$seconds" bash -c 'shard=$1; shift; exec "$@" --shard "$shard" \
    --finished "$VISIT/steps/'"$name"'/${shard%/*}.txt"' shard {} \
    env OMP_NUM_THREADS=2 "$PYTHON" -m pytest -p bench.shards -p no:cacheprovider -q -ra --tb=long "$@"
}

if [ $PLAN = 0 ]; then
  "$PYTHON" bench/visit.py begin || { echo "gpu.sh: cannot write to $VISIT or $OUT; name others" >&2; exit 2; }
  ARCH=$("$PYTHON" - "$DEVICE" 2>&1 >"$VISIT/logs/environment.log" <<'CHECK'
import sys
import numpy, pandas, pytest, torch, triton
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_name())
    print("%d%d" % torch.cuda.get_device_capability(), file=sys.stderr)
else:
    print(90, file=sys.stderr)
CHECK
  ) || { echo "gpu.sh: $ARCH; PYTHON must have torch, triton, numpy, pandas, pytest, and a GPU" >&2; exit 2; }
  { date -u; git rev-parse HEAD; nvidia-smi; } >>"$VISIT/logs/environment.log" 2>&1
fi

# (0) beside the others: kernels into Triton's cache, and the CUDA C++ operators where nvcc is
ITEMS=$(shards "$SHARES") step compile 120 \
  nice "$PYTHON" -m bench.smoke compile {} --arch "${ARCH:-90}" --only "$COMPILED" &
if [ $DEVICE = cuda ] && command -v nvcc >/dev/null; then
  step cuda-cpp 120 nice "$PYTHON" csrc/cuda/build.py --arch "${ARCH:-90}" &
fi
# (1) every kernel once
ITEMS=$FAMILIES step smoke 45 env CUDA_LAUNCH_BLOCKING=1 "$PYTHON" -m bench.smoke run {} --device $DEVICE
if [ $PLAN = 0 ] && ! "$PYTHON" bench/visit.py passed smoke cooperative; then
  echo "gpu.sh: cooperative kernels did not pass; the other steps go without them (PRUNETRAIN_COOPERATIVE=0)"
  export PRUNETRAIN_COOPERATIVE=0
fi
# (2) what the device can do at all, and the operators' times
step roof 10 "$PYTHON" -m bench roof --device $DEVICE "${SIZES[@]}" --out "$VISIT/rows"
suites sgd-lasso-bn 60 sgd lasso bn --no-compile --no-counters
# (3) whole steps
suites step 55 step --few --no-compile "${ONE_NETWORK[@]}"
# (4) values on the device, what has never run first
tests t2 85 $WORKERS -m t0 $TESTS
# (5) captured trainings
tests cuda-graphs 30 1 tests/train/test_cuda_graphs.py -k "captured_run or skipped_step"
# (6) gating
suites fig7-gating 50 fig7 gating --few --no-compile "${ONE_STAGE[@]}"
# (7) what is slow to measure
suites bn-compile 40 bn "${COMPILE[@]}" "${ONE_MAP[@]}"
suites conv-gather 30 conv gather --no-compile
EXPECTED=()
if [ $REHEARSE = 1 ]; then  # what can go wrong: a process that is killed, and one that neither ends nor listens
  EXPECTED=(dies hangs)
  step dies 1 bash -c 'kill -9 $$'
  step hangs 0.1 bash -c 'trap "" INT; while true; do sleep 1; done'
fi
wait
if [ $PLAN = 1 ]; then exit; fi
"$PYTHON" bench/visit.py end "${EXPECTED[@]}"
