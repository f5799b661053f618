#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serve a target with a kvspec head on http://127.0.0.1:8000 (OpenAI API).
#
#   examples/serve.sh
#   TARGET=Qwen/Qwen3-8B DRAFT=./head N=32 examples/serve.sh --port 9000
#   N=0 examples/serve.sh          # the same server without speculation
#
# Further arguments go to `vllm serve`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
TARGET="${TARGET:-$here/tiny/target}"
DRAFT="${DRAFT:-$here/tiny/draft}"
N="${N:-16}"
VLLM="${VLLM:-$([ -x "$here/../.venv/bin/vllm" ] && echo "$here/../.venv/bin/vllm" || echo vllm)}"

if [ -d "$TARGET" ] && [ -d "$DRAFT" ]; then
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
fi
flags=(--host 127.0.0.1 --served-model-name target)
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    # On a CPU: exact float32 for these tiny models, no compilation, and a small KV cache.
    flags+=(--dtype float32 --enforce-eager --max-model-len 512 --max-num-seqs 8 --kv-cache-memory-bytes 268435456)
fi
if [ "$N" -gt 0 ]; then
    flags+=(--speculative-config "{\"method\": \"kvspec\", \"model\": \"$DRAFT\", \"num_speculative_tokens\": $N}")
fi
exec "$VLLM" serve "$TARGET" "${flags[@]}" "$@"
