#!/usr/bin/env bash
# The end-to-end tests in the small cluster beside this repository: starts it, builds the image, tests,
# stops it. K8S_LAB says where the lab is, KEEP_LAB=1 leaves it up. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
lab="$(realpath "${K8S_LAB:-../shared/k8s-lab}")/lab"
test -x "$lab" || { echo "no lab at $lab: set K8S_LAB, or run 'make e2e' against a cluster of yours" >&2; exit 2; }
trap 'test -n "${KEEP_LAB:-}" || "$lab" down' EXIT
"$lab" up --nodes 3
eval "$("$lab" env)"
"$lab" build -t disagg:dev -f docker/Dockerfile --target cpu .
export DISAGG_E2E_IMAGE=localhost/disagg:dev DISAGG_E2E_CLIENT_NODE=n1
export DISAGG_E2E_LOSE_NODE="$lab lose" DISAGG_E2E_RESTORE_NODES="$lab up --nodes 3"
make e2e ARGS="${*:-tests/unit/chart}" # whose renders need the lab's helm
