#!/usr/bin/env bash
# All that is measured on a GPU, in one run of at most nine minutes that needs no network: the CUDA tests, training steps
# against PEFT in the shapes of SmolLM2-135M, SmolLM2-1.7B and Llama 3.1 8B with random weights, also in fp8, and answers:
# rows scored, and tokens written at 1 and 32 rows beside transformers' own generate.
#
#     make gpu-wheels                      # where there is a network: what the machine lacks, into build/wheels
#     bash benchmarks/gpu.sh               # on the GPU machine, whose Python has torch, transformers and peft
#     bash benchmarks/gpu.sh --tiny        # the whole with a tiny model on the CPU, to try it
#
# OUT (build/gpu) takes gpu.jsonl, gpu.md and the logs; what it holds is there even if the run is killed. WHEELS
# (build/wheels), PYTHON (python3), DATA (rows of SST-2; by default made up) and BUDGET (seconds, 530) may be set.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
wheels=${WHEELS:-build/wheels}
out=${OUT:-build/gpu}
budget=${BUDGET:-530}
tiny=
[ "${1:-}" = --tiny ] && tiny=1

mkdir -p "$out"
rm -f "$out"/gpu.jsonl "$out"/gpu.md "$out"/*.log
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
[ -n "$tiny" ] || export TORCHINDUCTOR_CACHE_DIR="$work/inductor" # so that a first step is the first

# Not a virtual environment: one made by a virtual environment's Python would not see that one's torch.
site="$work/site"
mkdir -p "$site"
if ls "$wheels"/*.whl >/dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl ||
    echo "The wheels in $wheels do not fit $("$python" --version); what is installed is used." >&2
fi
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir -p "$site/softprompt-$version.dist-info" # the package is not built, but its version is asked for
printf 'Metadata-Version: 2.1\nName: softprompt\nVersion: %s\n' "$version" >"$site/softprompt-$version.dist-info/METADATA"
export PYTHONPATH="$PWD/src:$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"

note() { # NAME WHY: a line on a part that did not come to its end
  "$python" -m benchmarks.gpu note --work "$work" --out "$out" --what "$1" --why "$2"
}

part() { # NAME SECONDS ARGUMENT...: one part with its time limit, cut to what is left; the parts behind it go on
  local name=$1 limit=$2 left=$((budget - SECONDS)) code
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 8 ]; then
    note "$name" "$left s are left"
    return 1
  fi
  timeout -k 5 "$limit" "$python" -m benchmarks.gpu "$@" --work "$work" --out "$out" --seconds "$((limit - 3))" \
    2> >(tee -a "$out/errors.log" >&2)
  code=$?
  case $code in
    0) ;;
    124 | 137) note "$name" "ended by its limit of $limit s" ;;
    *) note "$name" "exit code $code; see errors.log" ;;
  esac
  return "$code"
}

part setup 60 setup ${DATA:+--data "$DATA"} || exit
if [ -n "$tiny" ]; then
  small=(--device cpu --batch-size 8 --steps 3 --warmup 1)
  part "CUDA tests" 60 tests
  part "steps of the tiny model" 240 steps --model tiny "${small[@]}"
  part answers 90 answers --models tiny "${small[@]}"
else
  part "CUDA tests" 110 tests
  part "steps of 135M" 150 steps --model 135M
  part "steps of 1.7B" 120 steps --model 1.7B
  part "steps of 8B" "$((budget - SECONDS - 75))" steps --model 8B
  part answers "$((budget - SECONDS))" answers
fi
echo
cat "$out/gpu.md"
