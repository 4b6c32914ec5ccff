#!/usr/bin/env bash
# Makes one environment per peer of bench_quantize.py and bench_quality.py, 1.2 to 1.5 GB each, 6 GB for gptqmodel.
#
#   bash benchmarks/peers/setup.sh [--folder DIR] [--torch-index URL] [PEER ...]
#
# PEER is llm-compressor, auto-round, torchao, bitsandbytes or gptqmodel; without one the first three are made, which are
# those of bench_quantize.py. --torch-index names an index with CPU builds (https://download.pytorch.org/whl/cpu): without
# it pip takes torch from where it is set up to, which on Linux may be a build with gigabytes of CUDA. GPTQModel wants a
# torch of which there is no build for CPUs alone. PYTHON chooses the interpreter.
set -euo pipefail

FOLDER="$(cd "$(dirname "$0")/.." && pwd)/.peers"
INDEX=()
PEERS=()

while (($#)); do
  case $1 in
    --folder) FOLDER=${2:?"--folder needs a folder"} && shift 2 ;;
    --torch-index) INDEX=(--index-url "${2:?"--torch-index needs an address"}") && shift 2 ;;
    llm-compressor | auto-round | torchao | bitsandbytes | gptqmodel) PEERS+=("$1") && shift ;;
    *) echo "setup.sh: $1 is neither an option nor a peer; see the head of this file" >&2 && exit 2 ;;
  esac
done
((${#PEERS[@]})) || PEERS=(llm-compressor auto-round torchao)

packages() {
  case $1 in
    llm-compressor) echo llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 ;;
    auto-round) echo auto-round==0.16.1 transformers==5.23.0 ;;
    torchao) echo torchao==0.18.0 transformers==5.23.0 ;;
    bitsandbytes) echo bitsandbytes==0.50.2 transformers==5.23.0 ;;
    gptqmodel) echo gptqmodel==7.7.0 transformers==5.23.0 optimum==2.3.0 ;;
  esac
  echo accelerate==1.15.0 safetensors==0.8.0
}

torch_for() { [[ $1 == gptqmodel ]] && echo 2.14.1 || echo 2.13.0; }

for peer in "${PEERS[@]}"; do
  venv=$FOLDER/$peer
  torch=torch==$(torch_for "$peer")
  read -ra pins <<<"$(packages "$peer" | tr '\n' ' ')"
  stamp=$venv/.made
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$torch ${pins[*]}" ]]; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
    # torch first and alone, and held by a constraint afterwards: no peer may fetch another build
    pip install ${INDEX[@]+"${INDEX[@]}"} "$torch"
    pip install --constraint <(echo "$torch") "${pins[@]}"
    echo "$torch ${pins[*]}" >"$stamp"
  fi
  "$venv/bin/python" -c 'import sys, torch; print(*sys.argv[1:], "torch", torch.__version__)' "$peer:" "${pins[@]}"
done
