# SPDX-License-Identifier: Apache-2.0
"""Generate without a server: ``LLM(...).generate`` with a kvspec head, then the acceptance length.

python examples/offline_generate.py
python examples/offline_generate.py --no-spec          # the same texts, one step per token (on CPU: at temperature 0)
python examples/offline_generate.py --target Qwen/Qwen3-8B --draft ./head --prompt "Once upon a time"
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent


def cpu_engine_arguments() -> dict:
    """Engine arguments for a machine without a GPU: exact float32, no compilation, a small KV cache; none otherwise."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout[:3] == b"GPU":
        return {}
    return {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 28}


def prompts_of(path: Path, count: int) -> list[str]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row["prompt"] for row in rows if "prompt" in row][:count]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EXAMPLES / "tiny/target"))
    parser.add_argument("--draft", default=str(EXAMPLES / "tiny/draft"))
    parser.add_argument("--num-speculative-tokens", type=int, default=16)
    parser.add_argument("--no-spec", action="store_true")
    parser.add_argument("--prompt", action="append", help="repeatable; default: a few lines of prompts.jsonl")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    arguments = cpu_engine_arguments()
    if not args.no_spec:
        arguments["speculative_config"] = {
            "method": "kvspec",
            "model": args.draft,
            "num_speculative_tokens": args.num_speculative_tokens,
        }
    from vllm import LLM, SamplingParams

    llm = LLM(args.target, max_model_len=args.max_model_len, disable_log_stats=False, **arguments)
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    for output in llm.generate(args.prompt or prompts_of(EXAMPLES / "prompts.jsonl", 3), sampling):
        print(json.dumps({"prompt": output.prompt, "text": output.outputs[0].text}))
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    drafts, accepted = (counts.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "accepted_tokens"))
    if drafts:
        print(f"tau {1 + accepted / drafts:.2f} tokens per step ({accepted} accepted in {drafts} drafts)")


if __name__ == "__main__":
    main()
