#!/usr/bin/env bash
# Downloads peers that PyTorch does not bring, for Python 3.12 on x86-64 Linux with CUDA 13, and unpacks them into DIR:
#   bench/peers/fetch.sh DIR; PYTHONPATH=DIR:build/python python bench/peers/prefill.py
set -euo pipefail
dir=${1:?folder for the packages}
python3 -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.12 --target "$dir" \
  fa3-fwd==0.0.3 flashinfer-python==0.7.2.post1 apache-tvm-ffi click einops nvidia-ml-py tabulate
