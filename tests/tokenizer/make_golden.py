"""Write golden_*.json: what llama.cpp makes of our texts, for the tests to compare with.

Run by hand when texts are added: needs llama-cpp-python and gguf, which the tests do not.

    python tests/tokenizer/make_golden.py tiny
    python tests/tokenizer/make_golden.py smollm2 path/to/SmolLM2-135M-Instruct.Q4_1.gguf

`tiny` trains small vocabularies on the texts and lets llama.cpp use them with each pre-tokenizer
and SentencePiece rule; they are kept in the golden file, so the tests need no model for them.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
ARCHITECTURE = "llama"

SOURCE = json.loads((HERE / "texts.json").read_text())
TEXTS: list[str] = SOURCE["texts"]
ALPHABET: str = SOURCE["alphabet"]


def random_texts(count: int) -> list[str]:
    """Short mixtures of everything that decides where a text is cut."""
    chooser = random.Random(2)
    return [
        "".join(chooser.choice(ALPHABET) for _ in range(chooser.randint(1, 24)))
        for _ in range(count)
    ]


class Oracle:
    """llama.cpp's vocabulary of one file."""

    def __init__(self, path: Path) -> None:
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model.model)

    def ids(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 16))()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), buffer, len(buffer), add_special, parse_special
        )
        return list(buffer[:count])

    def cases(self, texts: list[str]) -> list[list[object]]:
        """[text, ids as plain text, ids with special tokens and the file's additions] each."""
        return [
            [
                text,
                self.ids(text, add_special=False, parse_special=False),
                self.ids(text, add_special=True, parse_special=True),
            ]
            for text in texts
        ]


def tiny_byte_level() -> dict[str, object]:
    """Metadata of a small byte-level vocabulary; the cut for training hardly matters."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [text for text, _ in sorted(model["vocab"].items(), key=lambda entry: entry[1])]
    kinds = [1] * len(tokens)
    # The last of these can only be found as a whole word: no merge leads to it.
    for text, kind in (
        ("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3), ("<|x|>", 3),
        ("<tag>", 4), ("[tool]", 4), ("[unused]", 5), ("Ġumbrella", 1),
    ):  # fmt: skip
        tokens.append(text)
        kinds.append(kind)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }


def tiny_sentencepiece() -> dict[str, object]:
    """Metadata of a small SentencePiece vocabulary with byte fallback and tokens of every type."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(" ", behavior="merged_with_next")
    tokenizer.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=120, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learned = [text for text, _ in sorted(model["vocab"].items(), key=lambda entry: entry[1])]
    learned = [text.replace(" ", "▁") for text in learned if not {"<", "\0", "\n"} & {*text}]
    runs = ["▁▁", "▁▁▁▁", "▁▁▁▁▁▁▁▁", "--", "----", "---", "aaa", "aaaaa"]
    learned = list(dict.fromkeys([*learned, *runs]))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *learned, "<|x|>", "<tag>", "\n\n", "<", "<s"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(learned), 3, 4, 4, 1, 1]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_vocabulary(path: Path, metadata: dict[str, object]) -> None:
    """A GGUF file without tensors that llama.cpp will load for its vocabulary."""
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, str(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_tiny() -> dict[str, object]:
    """Every kind of vocabulary: what it changes in the metadata that kinds share, and its cases."""
    shared = {"byte level": tiny_byte_level(), "sentencepiece": tiny_sentencepiece()}
    changes: list[tuple[str, str, object]] = [
        ("byte level", "tokenizer.ggml.pre", pre)
        for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2", "default")
    ]
    changes += [
        ("sentencepiece", "tokenizer.ggml.add_space_prefix", has_prefix)
        for has_prefix in (True, False)
    ]
    kinds = []
    with tempfile.TemporaryDirectory() as folder:
        for base, key, value in changes:
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(path, {**shared[base], key: value})
            cases = Oracle(path).cases(TEXTS + random_texts(40))
            kinds.append({"base": base, "key": key, "value": value, "cases": cases})
    return {"shared": shared, "kinds": kinds}


def main() -> None:
    """Write one golden file."""
    name = sys.argv[1]
    texts = TEXTS + random_texts(60)
    golden = make_tiny() if name == "tiny" else Oracle(Path(sys.argv[2])).cases(texts)
    path = HERE / f"golden_{name}.json"
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
