#!/usr/bin/env bash
# The end-to-end tests in the small cluster for one machine: starts it, builds the image, tests, stops it.
# LAB names its program, KEEP_LAB=1 leaves it up. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
lab="${LAB:?names the program of the small cluster; 'make e2e' runs against a cluster of yours}"
trap 'test -n "${KEEP_LAB:-}" || "$lab" down' EXIT
"$lab" up --nodes 3
eval "$("$lab" env)"
"$lab" build -t disagg:dev -f docker/Dockerfile --target cpu .
export DISAGG_E2E_IMAGE=localhost/disagg:dev DISAGG_E2E_CLIENT_NODE=n1
export DISAGG_E2E_LOSE_NODE="$lab lose" DISAGG_E2E_RESTORE_NODES="$lab up --nodes 3"
export DISAGG_E2E_PAUSE_API="pkill -STOP -x kube-apiserver" DISAGG_E2E_RESUME_API="pkill -CONT -x kube-apiserver"
export DISAGG_E2E_PROMETHEUS=http://prometheus.monitoring:9090
export DISAGG_E2E_FIGURES="${DISAGG_E2E_FIGURES:-$(mktemp)}"
make e2e ARGS="${*:-}"
cat "$DISAGG_E2E_FIGURES"
