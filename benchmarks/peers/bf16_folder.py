"""A GGUF file's weights, dequantized, as a bf16 safetensors folder for engines that need one.

Runs in a peer's environment: transformers knows each architecture's names and permutations. The
folder lies in the cache, named by the file's name, size and time, and is made once.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def bf16_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of a GGUF file: config.json, model.safetensors, the tokenizer if it converts."""
    status = path.stat()
    stamp = f"{path.name} {status.st_size} {status.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    home = os.environ.get("OCTAVO_HOME") or pathlib.Path.home() / ".cache" / "octavo"
    folder = pathlib.Path(home).absolute() / "peers" / "bf16" / name
    if folder.exists():
        return folder
    partial = folder.with_name(f".partial-{name}")
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    partial.mkdir(parents=True)
    tied = getattr(model, "_tied_weights_keys", None) or ()
    skipped = set(tied) if model.config.tie_word_embeddings else set()
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n not in skipped}
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    config = (
        model.config
    )  # the model's own save_pretrained takes it for one that is still in GGUF blocks
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    try:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(partial)
    except Exception as error:
        # Token ids go in and come out: who needs the tokenizer will say so.
        print(f"no tokenizer for {path.name}: {error}", file=sys.stderr)
    partial.rename(folder)
    return folder
