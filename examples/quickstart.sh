#!/usr/bin/env bash
# The pipeline of quickstart.yaml as shell commands. Each line runs on its own; the same line again resumes it.
# A test compares the two files.
set -euo pipefail
cd "$(dirname "$0")/.."

cai sample examples/red_team.jsonl -o runs/quickstart/samples.jsonl --limit 8 --max-new-tokens 48 --temperature 0.7 --dtype bfloat16 --model smollm2-135m --seed 0
cai critique runs/quickstart/samples.jsonl -o runs/quickstart/critiques.jsonl --max-new-tokens 48 --temperature 0.7 --dtype bfloat16 --model smollm2-135m --seed 0
cai revise runs/quickstart/critiques.jsonl -o runs/quickstart/revisions.jsonl --max-new-tokens 48 --temperature 0.7 --dtype bfloat16 --model smollm2-135m --seed 0
cai sft examples/feedback/revisions.jsonl -o runs/quickstart/sl-cai --limit 120 --also runs/quickstart/revisions.jsonl --helpful examples/feedback/helpful.jsonl --helpful-ratio 3.65 --chat-template examples/chatml.jinja --epochs 1.5 --learning-rate 0.0003 --batch-size 8 --gradient-accumulation 1 --eval-share 0.05 --save-steps 200 --dtype bfloat16 --attention eager --model smollm2-135m --seed 0
cai sample examples/red_team.jsonl -o runs/quickstart/pairs.jsonl --model runs/quickstart/sl-cai --n 2 --limit 8 --max-new-tokens 48 --temperature 0.7 --dtype bfloat16 --seed 0
cai label-prefs runs/quickstart/pairs.jsonl -o runs/quickstart/preferences.jsonl --dtype bfloat16 --model smollm2-135m --seed 0
cai train-pm examples/feedback/preferences.jsonl -o runs/quickstart/pm --limit 240 --also runs/quickstart/preferences.jsonl --model runs/quickstart/sl-cai --fit-head --epochs 0 --dtype bfloat16 --seed 0
cai rl examples/red_team.jsonl -o runs/quickstart/rl-cai --limit 24 --held-out 6 --model runs/quickstart/sl-cai --pm runs/quickstart/pm --monitor-pm smollm2-135m+examples/feedback/harmless_probe --steps 3 --prompts-per-step 2 --max-new-tokens 48 --seed 0
cai sample examples/feedback/held_out.jsonl -o runs/quickstart/start-replies.jsonl --max-new-tokens 48 --temperature 0.5 --dtype bfloat16 --model smollm2-135m --seed 0
cai sample examples/feedback/held_out.jsonl -o runs/quickstart/sl-cai-replies.jsonl --model runs/quickstart/sl-cai --max-new-tokens 48 --temperature 0.5 --dtype bfloat16 --seed 0
cai sample examples/feedback/held_out.jsonl -o runs/quickstart/rl-cai-replies.jsonl --model runs/quickstart/rl-cai --max-new-tokens 48 --temperature 0.5 --dtype bfloat16 --seed 0
cai eval compare start=runs/quickstart/start-replies.jsonl sl-cai=runs/quickstart/sl-cai-replies.jsonl rl-cai=runs/quickstart/rl-cai-replies.jsonl -o runs/quickstart/compare.jsonl --pm smollm2-135m+examples/feedback/harmless_probe --only red-team --dtype bfloat16 --seed 0
