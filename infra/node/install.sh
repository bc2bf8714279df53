#!/usr/bin/env bash
# Installs the pinned packages of training and of DVC into .venv of this clone; HAPLOVL_PYTHON names a Python that has
# them already, such as the container's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -z "${HAPLOVL_PYTHON:-}" ] || exit 0
python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || true)
if [ -z "$python" ]; then
    command -v uv >/dev/null || { echo "error: this node has neither Python 3.11 or newer nor uv" >&2; exit 1; }
    uv venv --quiet --allow-existing --seed --python 3.11 .venv
    python=.venv/bin/python
fi
make venv PYTHON="$python" EXTRAS=train,pipeline,s3
