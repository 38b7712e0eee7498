#!/usr/bin/env bash
# Fills a folder with what a Hopper machine without a package registry lacks to run SGLang 0.5.16: the wheels of wheelhouse.txt and
# sglang-kernel's sm_90 operators alone (install.md says how to use it). Fails when the folder outgrows what can be carried.
#
#   benchmark/gpu/wheelhouse.sh [DIR=.wheelhouse]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-.wheelhouse}
python=${PYTHON:-python3}
limit_mib=60

mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package would stop pip there
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT

# pip takes each manylinux tag literally: an older one does not imply the newer.
tags=()
for tag in manylinux1 manylinux2014 manylinux_2_{17,24,26,27,28,31,34}; do tags+=(--platform "${tag}_x86_64"); done

fetch() { # fetch DIR REQUIREMENT...
  local into=$1
  shift
  "$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${tags[@]}" --dest "$into" "$@" 2>"$whole/log" || { cat "$whole/log" >&2; exit 1; }
}

fetch "$folder" --requirement "$here/wheelhouse.txt"
fetch "$whole" sglang-kernel==0.4.5

# Flash attention (1.1 GB), Blackwell and MLA operators go: --attention-backend triton and --sampling-backend pytorch never call them.
kernel=$(cd "$whole" && ls sglang_kernel-*.whl)
"$python" "$here/trim_wheel.py" "$whole/$kernel" "$folder/$kernel" flash_ops flashmla_ops infllm_ops sm100/

size_mib=$(du --summarize --block-size=1M "$folder" | cut -f1)
if [ "$size_mib" -ge "$limit_mib" ]; then verdict=short; else verdict=ok; fi
echo "wheelhouse: $size_mib MiB (goal < $limit_mib) $verdict"
[ "$verdict" = ok ]
