#!/usr/bin/env bash
# Makes one environment per peer of bench_quantize.py, 1.2 to 1.5 GB each.
#
#   bash benchmarks/peers/setup.sh [--folder DIR] [--torch-index URL] [PEER ...]
#
# PEER is llm-compressor, auto-round or torchao; without one all three are made. --torch-index names an index with CPU
# builds (https://download.pytorch.org/whl/cpu): without it pip takes torch from where it is set up to, which on Linux
# may be a build with gigabytes of CUDA. PYTHON chooses the interpreter.
set -euo pipefail

TORCH=2.13.0
FOLDER="$(cd "$(dirname "$0")/.." && pwd)/.peers"
INDEX=()
PEERS=()

while (($#)); do
  case $1 in
    --folder) FOLDER=${2:?"--folder needs a folder"} && shift 2 ;;
    --torch-index) INDEX=(--index-url "${2:?"--torch-index needs an address"}") && shift 2 ;;
    llm-compressor | auto-round | torchao) PEERS+=("$1") && shift ;;
    *) echo "setup.sh: $1 is neither an option nor a peer; see the head of this file" >&2 && exit 2 ;;
  esac
done
((${#PEERS[@]})) || PEERS=(llm-compressor auto-round torchao)

packages() {
  case $1 in
    llm-compressor) echo llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 ;;
    auto-round) echo auto-round==0.16.1 transformers==5.23.0 ;;
    torchao) echo torchao==0.18.0 transformers==5.23.0 ;;
  esac
  echo accelerate==1.15.0 safetensors==0.8.0
}

for peer in "${PEERS[@]}"; do
  venv=$FOLDER/$peer
  read -ra pins <<<"$(packages "$peer" | tr '\n' ' ')"
  stamp=$venv/.made
  if [[ "$(cat "$stamp" 2>/dev/null)" != "torch==$TORCH ${pins[*]}" ]]; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
    # torch first and alone, and held by a constraint afterwards: no peer may fetch another build
    pip install ${INDEX[@]+"${INDEX[@]}"} "torch==$TORCH"
    pip install --constraint <(echo "torch==$TORCH") "${pins[@]}"
    echo "torch==$TORCH ${pins[*]}" >"$stamp"
  fi
  "$venv/bin/python" -c 'import sys, torch; print(*sys.argv[1:], "torch", torch.__version__)' "$peer:" "${pins[@]}"
done
