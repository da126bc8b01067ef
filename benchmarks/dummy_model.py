"""Write a GGUF file of random weights with a model's shape: speed does not depend on what they say.

    python benchmarks/dummy_model.py OUT.gguf [--shape llama-1.5b] [--type Q4_K]
        [--vocabulary SmolLM2.gguf]

Seconds. All matrices have the one type (also "F32"), norms are F32; the output matrix is of its
own. The vocabulary is copied from another file (default: the known model smollm2), so that any
engine loads it. Weights are of ordinary size: logits stay finite. Needs the gguf package.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
from cpu.blocks import BLOCKS, HALVES, random_blocks
from numpy.typing import NDArray

from octavo.weights import source


@dataclass(frozen=True, slots=True)
class Shape:
    """What a Llama is made of; every width a multiple of 256, as the K formats want."""

    layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def matrices(self, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor; one dimension means a norm."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "token_embd.weight", (vocab_size, self.hidden)
        for i in range(self.layers):
            yield f"blk.{i}.attn_norm.weight", (self.hidden,)
            yield f"blk.{i}.attn_q.weight", (q, self.hidden)
            yield f"blk.{i}.attn_k.weight", (kv, self.hidden)
            yield f"blk.{i}.attn_v.weight", (kv, self.hidden)
            yield f"blk.{i}.attn_output.weight", (self.hidden, q)
            yield f"blk.{i}.ffn_norm.weight", (self.hidden,)
            yield f"blk.{i}.ffn_gate.weight", (self.intermediate, self.hidden)
            yield f"blk.{i}.ffn_up.weight", (self.intermediate, self.hidden)
            yield f"blk.{i}.ffn_down.weight", (self.hidden, self.intermediate)
        yield "output_norm.weight", (self.hidden,)
        yield "output.weight", (vocab_size, self.hidden)


SHAPES = {
    "llama-0.1b": Shape(4, 1024, 2816, 16, 4, 64),
    "llama-1.5b": Shape(24, 2048, 8192, 32, 8, 64),
}


def copy_vocabulary(writer: gguf.GGUFWriter, path: pathlib.Path) -> int:
    """Take every tokenizer field of a file; the number of its tokens."""
    fields = gguf.GGUFReader(path).fields
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    return len(fields["tokenizer.ggml.tokens"].data)


def write_metadata(writer: gguf.GGUFWriter, shape: Shape, vocab_size: int, type_name: str) -> None:
    """What an engine needs to know of the model."""
    writer.add_name("Random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab_size)
    names = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
    names |= {"Q3_K": "MOSTLY_Q3_K_M"}
    file_type = names.get(type_name, f"MOSTLY_{type_name}")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def values(rng: np.random.Generator, dims: tuple[int, ...], type_name: str) -> NDArray[np.generic]:
    """A tensor's contents: blocks as bytes [rows, bytes], floats as they are."""
    if len(dims) == 1:
        return np.ones(dims, np.float32)
    if type_name == "F32":
        return rng.standard_normal(dims, np.float32) * np.float32(0.02)
    return random_blocks(rng, type_name, dims[0] * dims[1]).reshape(dims[0], -1)


def write(out: pathlib.Path, shape: Shape, type_name: str, vocabulary: pathlib.Path) -> None:
    """Write the file: the table of tensors first, then one tensor after another."""
    writer = gguf.GGUFWriter(out, "llama")
    vocab_size = copy_vocabulary(writer, vocabulary)
    write_metadata(writer, shape, vocab_size, type_name)
    tensors = dict(shape.matrices(vocab_size))
    for name, dims in tensors.items():
        if len(dims) == 1 or type_name == "F32":
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * int(np.prod(dims)))
            continue
        layout = BLOCKS[type_name]
        row_bytes = dims[1] // layout.block_len * layout.block_bytes
        writer.add_tensor_info(
            name,
            (dims[0], row_bytes),
            np.dtype(np.uint8),
            dims[0] * row_bytes,
            gguf.GGMLQuantizationType[type_name],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for dims in tensors.values():
        writer.write_tensor_data(values(rng, dims, type_name))
    writer.close()


def main() -> None:
    """Write the file and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-1.5b")
    parser.add_argument("--type", choices=("F32", *HALVES), default="Q4_K")
    parser.add_argument("--vocabulary", default="smollm2", help="a GGUF file or a known name")
    options = parser.parse_args()
    began = time.perf_counter()
    vocabulary = source.resolve(options.vocabulary)
    write(options.out, SHAPES[options.shape], options.type, pathlib.Path(vocabulary))
    size = options.out.stat().st_size / 1e9
    print(f"{options.out}: {size:.2f} GB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
