#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the tiny pair from nothing but this Python: corpus, target, the target's own text, head, acceptance.
#   bash examples/tiny/make.sh [DIRECTORY]      (default: examples/tiny; an existing target is kept)
# Two CPU cores need about an hour and a half, a GPU some minutes.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${1:-$here}"
work="$out/work.checkpoints"
mkdir -p "$work"

python "$here/corpus.py" "$work"
if [ ! -e "$out/target/model.safetensors" ]; then
  python "$here/train_target.py" --output_dir "$out/target" --max_steps 1300
fi
python -m vllm_kvspec.cli prepare --target_model "$out/target" --data_path "$work/train.jsonl" \
  --output "$work/rows.jsonl" --num_prompts 2304 --prompt_length 64 --max_new_tokens 160 --max_length 512 \
  --batch_size 192 --temperatures 0 1 --regenerate transformers
train() {
  python -m vllm_kvspec.cli train --target_model "$out/target" --data_path "$work/rows.jsonl" \
    --anchors_per_sequence 32 --per_device_train_batch_size 8 --weight_decay 0.0 --adam_beta2 0.95 \
    --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.05}' \
    --logging_steps 25 --save_strategy no --report_to none "$@"
}
train --output_dir "$work/draft-1" --num_layers 3 --transition table --transition_rank 96 --max_steps 1000 --learning_rate 2e-3 \
  --warmup_steps 30
train --output_dir "$out/draft" --overwrite_output_dir --from_pretrained "$work/draft-1" \
  --min_teacher_temperature 0.5 --max_steps 350 --learning_rate 1e-3 --warmup_steps 15 --seed 1
python -m vllm_kvspec.cli eval --target_model "$out/target" --draft_model "$out/draft" \
  --data_path "$work/held_out.jsonl" --num_prompts 64 --seed 1 --no_graft --no_bottlenecks --texts_dir "$work/texts" \
  --output "$out/draft/acceptance.json"
