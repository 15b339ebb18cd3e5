#!/usr/bin/env bash
# How many mutants of the modules below the tests kill: `make mutants`, or with some of their names. Takes an hour.
#
# With SAMPLE=90, 90 of each module's, drawn at random. In a copy of the tree, so that nobody meets a mutant. Operators are exchanged for their nearest relatives only: a
# product that becomes a shift fails by its type and says nothing about a test.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD out=$PWD/build/mutants
mkdir -p "$out"
declare -A tests=(
  [neurons]="test_neurons.py test_modules.py test_methods.py"
  [selection]="test_selection.py test_plan.py test_calibration_fuse.py"
  [store/folding]="test_states.py test_folding.py test_offload.py test_hosts.py"
  [store/states]="test_states.py test_folding.py test_hosts.py"
  [store/restoring]="test_states.py test_folding.py test_verify.py test_hosts.py"
  [calibration/refit]="test_calibration.py test_calibration_fuse.py"
)
rm -rf "$out/tree"
git ls-files -z -- python fusion_kernels tests pyproject.toml | xargs -0 cp --parents -t "$(mkdir -p "$out/tree" && echo "$out/tree")"
cp fusion_kernels/*.so "$out/tree/fusion_kernels/" 2>/dev/null || true
cd "$out/tree"
export PYTHONPATH=$PWD/python:$PWD PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1
socket=$(mktemp -u)
"$root/.venv/bin/python" tests/support/mutation.py serve "$socket" >"$out/server.log" 2>&1 &
trap 'kill %1; rm -f "$socket"' EXIT
until [ -S "$socket" ]; do kill -0 %1 && sleep 1; done
# Without a mutant the tests must pass, before and after, or every mutant would seem to be killed.
passes() {
  "$root/.venv/bin/python" -S tests/support/mutation.py run "$socket" "${@:2}" || { echo "$1: its tests fail"; exit 1; }
}
for name in "${@:-${!tests[@]}}"; do
  session=$out/${name//\//-}
  files=$(printf 'tests/mlp_fusion/%s ' ${tests[$name]})
  cat >"$session.toml" <<EOF2
[cosmic-ray]
module-path = "python/mlp_fusion/$name.py"
timeout = 180.0
excluded-modules = []
test-command = "$root/.venv/bin/python -S tests/support/mutation.py run $socket $files"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = [
  "core/ReplaceBinaryOperator_.*_(FloorDiv|Mod|Pow|RShift|LShift|BitOr|BitAnd|BitXor)",
  "core/ReplaceBinaryOperator_(BitOr|BitAnd|BitXor|LShift|RShift)_.*",
]
EOF2
  passes "$name" $files
  rm -f "$session.sqlite"
  cosmic-ray init "$session.toml" "$session.sqlite"
  cr-filter-operators "$session.sqlite" "$session.toml"
  [ -z "${SAMPLE:-}" ] || "$root/.venv/bin/python" tests/support/mutation.py sample "$session.sqlite" "$SAMPLE"
  cosmic-ray exec "$session.toml" "$session.sqlite"
  passes "$name" $files
  "$root/.venv/bin/python" tests/support/mutation.py report "$session.sqlite" | tee "$session.txt"
done
