#!/usr/bin/env bash
# Writes the stubs beside the .proto files, or under the folder given as $1.
# grpcio-tools is pinned to the oldest grpcio we promise callers: stubs refuse anything older than their generator.
set -euo pipefail
cd "$(dirname "$0")"
out=${1:-.}
PATH="$(dirname "$(command -v "${PYTHON:-python}")"):$PATH" "${PYTHON:-python}" -m grpc_tools.protoc -I . \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  saeguard/v1/*.proto
