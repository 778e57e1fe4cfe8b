#!/usr/bin/env bash
# The main job, whole: validate, preview, estimate, train, evaluate, merge, and questions to base and tuned model.
# A second run starts over: it moves nothing and asks nothing, it removes the last quickstart's own folders first.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf runs/quickstart runs/quickstart-merged
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
say lorafit validate recipes/quickstart.yaml
say lorafit preview recipes/quickstart.yaml --rows 2
say lorafit estimate-memory recipes/quickstart.yaml
say lorafit train recipes/quickstart.yaml
say lorafit eval runs/quickstart
say lorafit merge runs/quickstart --output runs/quickstart-merged
say lorafit generate runs/quickstart --compare-base --input recipes/data/questions.txt --max-new-tokens 48
