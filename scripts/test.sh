#!/usr/bin/env bash
# Every test: the C++ core under sanitizers, then Python, in parallel where it helps.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/cmake -S . -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DDISAGG_TESTS=ON \
  -DDISAGG_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
.venv/bin/cmake --build build/sanitized -- --quiet
.venv/bin/ctest --test-dir build/sanitized --output-on-failure -j "$(nproc)"
.venv/bin/python -m pytest tests/unit tests/regressions -n "$(nproc)"
.venv/bin/python -m pytest tests/integration
