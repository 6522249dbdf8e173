#!/usr/bin/env bash
# One visit to a GPU machine: everything worth having in at most 9 minutes.
#
#   bench/gpu.sh                              on a GPU; results in bench/results/DEVICE (QUICK=1: in runs/bench)
#   OUT=/tmp/out bench/gpu.sh                 results elsewhere
#   STEPS="fig7 bn" bench/gpu.sh              only these steps, for a second visit
#   DEVICE=cpu QUICK=1 bench/gpu.sh           a dry run through all steps, without a GPU
#
# Needs nothing but Python with torch, triton, numpy, pandas, pytest: no network, nothing installed, no virtual
# environment (PYTHON names another interpreter). Steps, in order of value; a step that fails or runs out of time is
# reported, and the next one goes on:
#
#   cuda-cpp     builds csrc/cuda, where nvcc is
#   t2           the operators' tests on the device (tier T2), bitwise and CUDA-graph tests included
#   optimizers   200 steps of ResNet-20 against torch.optim.SGD, through two reconfigurations
#   cuda-graphs  `prunetrain train --cuda-graphs` against the same runs without, through reconfigurations
#   roof         what the device can do
#   sgd-lasso-bn gating-32 fig7-32 step gating-256 fig7-256 conv gather inference reconfigure memory-comm step-compile
#                suites: python -m bench run ...; torch.compile of whole steps comes last, a minute per shape
#   memcheck racecheck   compute-sanitizer on a few small tests, where that tool is there
#
# Everything is written as it goes, a row file is whole at every moment: a visit that is cut off leaves what it has.
# Exit code 1 if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

DEVICE=${DEVICE:-cuda}
QUICK=${QUICK:-0}
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-540}
STEPS=${STEPS:-}
RESULTS=()  # without OUT the suites write to bench/results/DEVICE, which is where committed results belong
if [ "$QUICK" = 1 ]; then OUT=${OUT:-runs/bench}; fi  # tiny sizes only show that the steps work
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT" || { echo "gpu.sh: cannot write to OUT=$OUT; name another folder" >&2; exit 2; }
  OUT=$(cd "$OUT" && pwd)
  RESULTS=(--out "$OUT")
else
  OUT=$PWD/bench/results
fi
LOGS=$OUT/logs
mkdir -p "$LOGS" || { echo "gpu.sh: cannot write to $LOGS; name another folder with OUT" >&2; exit 2; }
LOG=$LOGS/gpu.log
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/prunetrain-triton}  # a home folder may be read-only
unset TRITON_INTERPRET  # the tests set it themselves where they need it

case $DEVICE in cpu | cuda) ;; *) echo "gpu.sh: DEVICE is cpu or cuda, not $DEVICE" >&2; exit 2 ;; esac
VERSIONS=$("$PYTHON" -c '
import sys
try:
    import numpy, pandas, pytest, torch, triton
except ImportError as error:
    sys.exit(f"gpu.sh: {sys.executable}: {error}; set PYTHON to one that has torch, triton, numpy, pandas, pytest")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("gpu.sh: this PyTorch sees no CUDA device; DEVICE=cpu QUICK=1 makes a dry run")
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
for i in range(torch.cuda.device_count() if sys.argv[1] == "cuda" else 0):
    print(torch.cuda.get_device_name(i))' "$DEVICE") || exit 2

say() { echo "[$SECONDS s] $*" | tee -a "$LOG"; }

FAILED=0
# step NAME LIMIT COMMAND...: at most LIMIT seconds, and never beyond the visit's end. SIGINT first, so that Python
# still prints how far it came.
step() {
  local name=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS)) code
  shift 2
  if [ -n "$STEPS" ] && [[ " $STEPS " != *" $name "* ]]; then return; fi
  if [ "$left" -lt 15 ]; then say "SKIPPED $name: no time left"; FAILED=1; return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  say "BEGIN $name (at most $limit s): $*"
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$LOG" "$LOGS/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) say "DONE $name" ;;
    124 | 137) say "OUT OF TIME $name"; FAILED=1 ;;
    *) say "FAILED $name: exit code $code"; FAILED=1 ;;
  esac
}

: >"$LOG"
{
  date -u
  git rev-parse HEAD 2>/dev/null || echo "no git here"
  echo "$VERSIONS"
  if [ "$DEVICE" = cuda ]; then nvidia-smi 2>/dev/null | head -15; fi
} 2>&1 | tee -a "$LOG"

TESTS=(tests/ops)
OPTIMIZERS=(tests/optim -k "200 or kernels")
SETTINGS=(--device "$DEVICE")
LARGE=(--batch 256)
if [ "$QUICK" = 1 ]; then
  TESTS=(tests/ops/test_on_gpu.py)
  OPTIMIZERS=(tests/optim -k scheduler)
  SETTINGS+=(--quick)
  LARGE=(--batch 4)
fi
SETTINGS+=("${RESULTS[@]}")
bench() { # bench NAME LIMIT ARGUMENTS...: a step of `python -m bench`
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m bench "$@" "${SETTINGS[@]}"
}

find "$LOGS" -name '*.log' ! -name gpu.log -delete
if [ "$DEVICE" = cuda ] && command -v nvcc >/dev/null; then  # a provider beside Triton; the suites do without it too
  step cuda-cpp 90 "$PYTHON" csrc/cuda/build.py
else
  say "SKIPPED cuda-cpp: the CUDA C++ operators need nvcc and a GPU"
fi
step t2 200 "$PYTHON" -m pytest -m t0 --device "$DEVICE" -q -ra -p no:cacheprovider "${TESTS[@]}"
step optimizers 60 "$PYTHON" -m pytest --device "$DEVICE" -q -ra -p no:cacheprovider "${OPTIMIZERS[@]}"
step cuda-graphs 90 "$PYTHON" -m pytest --device "$DEVICE" -q -ra -p no:cacheprovider tests/train/test_cuda_graphs.py
bench roof 30 roof --record
bench sgd-lasso-bn 150 run sgd lasso bn
bench gating-32 60 run gating
bench fig7-32 60 run fig7
bench step 120 run step --no-compile
bench gating-256 60 run gating "${LARGE[@]}"
bench fig7-256 60 run fig7 "${LARGE[@]}"
bench conv 60 run conv
bench gather 30 run gather
bench inference 60 run inference --no-compile
bench reconfigure 40 run reconfigure
bench memory-comm 40 run memory comm
bench step-compile 120 run step --only resnet32 --compile

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)
if [ "$DEVICE" = cuda ] && [ -n "$SANITIZER" ]; then
  # without PyTorch's caching allocator every tensor is a block of its own, and what lies beside it is out of bounds
  for tool in memcheck racecheck; do
    step $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool $tool --error-exitcode 3 \
      "$PYTHON" -m pytest -m t0 --device cuda -q -p no:cacheprovider -k sanitized tests/ops/test_on_gpu.py
  done
else
  say "SKIPPED memcheck, racecheck: compute-sanitizer works on CUDA and comes with the CUDA toolkit"
fi

say "$([ $FAILED = 0 ] && echo "all steps done" || echo "some steps failed, see above"); logs in $LOGS"
exit $FAILED
