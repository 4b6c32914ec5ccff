#!/usr/bin/env bash
# Makes .venv-gptqmodel, 6 GB with torch's CUDA libraries, for tests/engines/test_gptqmodel.py: GPTQModel wants a torch of
# which there is no build for CPUs alone. Set QCONVERT_GPTQMODEL_PYTHON to use another environment.
set -euo pipefail
cd "$(dirname "$0")/../.."

VENV=.venv-gptqmodel
STAMP=$VENV/.gptqmodel-7.7.0
if [[ -z ${QCONVERT_GPTQMODEL_PYTHON:-} && ! -e $STAMP ]]; then
  rm -rf "$VENV"
  "${PYTHON:-python3}" -m venv "$VENV"
  pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
  pip install torch==2.14.1
  pip install transformers==5.23.0 optimum==2.3.0 gptqmodel==7.7.0
  touch "$STAMP"
fi
