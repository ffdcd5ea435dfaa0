#!/usr/bin/env bash
# The pipeline of quickstart.yaml as shell commands. Each line runs on its own; the same line again resumes it.
# A test compares the two files.
set -euo pipefail
cd "$(dirname "$0")/.."

cai sample examples/red_team.jsonl -o runs/quickstart/samples.jsonl --limit 24 --max-new-tokens 64 --temperature 0.7 --model smollm2-135m --seed 0
cai critique runs/quickstart/samples.jsonl -o runs/quickstart/critiques.jsonl --max-new-tokens 64 --temperature 0.7 --model smollm2-135m --seed 0
cai revise runs/quickstart/critiques.jsonl -o runs/quickstart/revisions-1.jsonl --max-new-tokens 64 --temperature 0.7 --model smollm2-135m --seed 0
cai critique-revise runs/quickstart/revisions-1.jsonl -o runs/quickstart/revisions.jsonl --rounds 1 --max-new-tokens 64 --temperature 0.7 --model smollm2-135m --seed 0
cai sample examples/helpful.jsonl -o runs/quickstart/helpful.jsonl --limit 24 --max-new-tokens 64 --temperature 0.7 --model smollm2-135m --seed 0
cai sft runs/quickstart/revisions.jsonl -o runs/quickstart/sl-cai --helpful runs/quickstart/helpful.jsonl --model smollm2-135m --seed 0
cai sample examples/red_team.jsonl -o runs/quickstart/pairs.jsonl --model runs/quickstart/sl-cai --n 2 --limit 32 --max-new-tokens 64 --temperature 0.7 --seed 0
cai label-prefs runs/quickstart/pairs.jsonl -o runs/quickstart/preferences.jsonl --model smollm2-135m --seed 0
cai train-pm runs/quickstart/preferences.jsonl -o runs/quickstart/pm --model runs/quickstart/sl-cai --seed 0
cai rl examples/red_team.jsonl -o runs/quickstart/rl-cai --limit 48 --model runs/quickstart/sl-cai --pm runs/quickstart/pm --steps 6 --prompts-per-step 2 --max-new-tokens 48 --seed 0
cai sample examples/red_team.jsonl -o runs/quickstart/after.jsonl --model runs/quickstart/rl-cai --limit 24 --max-new-tokens 64 --temperature 0.7 --seed 0
