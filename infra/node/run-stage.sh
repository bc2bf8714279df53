#!/usr/bin/env bash
# One node's share of a training stage, in a clone at the job's commit; flows/node.py says what it does.
# HAPLOVL_STAGE, HAPLOVL_COMPUTE, HAPLOVL_LOCK (the flow's dvc.lock), HAPLOVL_STATE (a folder that outlives the node).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export DVC_NO_ANALYTICS=1 DO_NOT_TRACK=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"   # this commit's code, whatever else is installed
exec "${HAPLOVL_PYTHON:-.venv/bin/python}" -m flows.node "$HAPLOVL_STAGE"
