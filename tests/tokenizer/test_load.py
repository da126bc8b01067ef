"""Loading from GGUF files: the whole way through a file, refusals, eos ids, kept merges, time."""

from __future__ import annotations

import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import gguf
import pytest

from octavo.errors import ModelFileError
from octavo.tokenizer import merges
from octavo.tokenizer.gguf_vocabulary import gguf_vocabulary
from octavo.tokenizer.load import eos_token_ids, load_tokenizer
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.types import Span


def write_gguf(path: Path, metadata: dict[str, Any]) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sentencepiece_file(sentencepiece_metadata: dict[str, Any], tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    path = write_gguf(
        tmp_path / "model.gguf", {**sentencepiece_metadata, "tokenizer.chat_template": template}
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == len(sentencepiece_metadata["tokenizer.ggml.tokens"])
    assert tokenizer.special_ids >= {0, 1, 2}
    assert tokenizer.eos_token_ids == eos_token_ids(path) == {2}
    assert tokenizer.chat_template is not None
    spans = tokenizer.chat_template.render([{"role": "user", "content": "</s>"}])
    assert spans == [Span("<s>", True), Span("</s>", False), Span("</s>", True)]
    ids = tokenizer.encode_spans(spans)
    assert ids[0] == 1 and ids[-1] == 2 and not set(ids[1:-1]) & tokenizer.special_ids


def test_a_template_beside_the_file_replaces_its_own(
    sentencepiece_metadata: dict[str, Any], tmp_path: Path
) -> None:
    metadata = {**sentencepiece_metadata, "tokenizer.chat_template": "inside"}
    path = write_gguf(tmp_path / "model.gguf", metadata)

    def source() -> str | None:
        template = load_tokenizer(path).chat_template
        return None if template is None else template.source

    assert source() == "inside"
    (tmp_path / "model.jinja").write_text("beside é", encoding="utf-8")
    assert source() == "beside é"
    (tmp_path / "model.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"model\.jinja cannot be read"):
        load_tokenizer(path)
    write_gguf(path, sentencepiece_metadata)
    (tmp_path / "model.jinja").unlink()
    assert source() is None


def test_default_model(smollm2: Tokenizer, smollm2_path: Path) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.special_ids == set(range(17))
    # 2 is declared; 0 is named <|endoftext|>
    assert smollm2.eos_token_ids == {0, 2} == eos_token_ids(smollm2_path)
    assert smollm2.encode("Hello") == [19556]


def test_loading_takes_moments(smollm2_path: Path) -> None:
    times = []
    for _ in range(5):
        start = time.process_time()
        load_tokenizer(smollm2_path)
        times.append(time.process_time() - start)
    assert min(times) < 0.4  # 0.1 s on an idle machine; the budget there is 0.2 s


def test_refusals(byte_level_metadata: dict[str, Any], tmp_path: Path) -> None:
    def refuse(match: str, **changes: object) -> None:
        changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        with pytest.raises(ModelFileError, match=match):
            gguf_vocabulary({**byte_level_metadata, **changed})

    refuse("'klingon', which Octavo cannot reproduce", pre="klingon")
    refuse("tokenizer.ggml.model is 'bert'", model="bert")
    refuse("tokenizer is broken", merges=["a b c", "zz yy"])
    refuse("pre is not a string", pre=1)
    with pytest.raises(ModelFileError, match="has no tokenizer"):
        gguf_vocabulary({})
    with pytest.raises(ModelFileError):
        load_tokenizer(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError):
        eos_token_ids(tmp_path / "missing.gguf")


def test_which_tokens_end_an_answer(byte_level_metadata: dict[str, Any]) -> None:
    tokens = byte_level_metadata["tokenizer.ggml.tokens"]
    named = {tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")}
    declared = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.eom_token_id": 7,
    }
    vocabulary = gguf_vocabulary({**byte_level_metadata, **declared})
    assert vocabulary.eos_token_ids == {5, 6, 7, *named}
    out_of_range = {"tokenizer.ggml.eos_token_id": 10**6}
    assert gguf_vocabulary({**byte_level_metadata, **out_of_range}).eos_token_ids == named


def test_eos_ids_need_no_tokenizer() -> None:
    """The engine process asks for them and must stay light."""
    program = (
        "import sys, octavo.tokenizer.eos;"
        "sys.exit(not {'tokenizers', 'jinja2', 'numpy'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_bos_and_eos_around_a_text(byte_level_metadata: dict[str, Any]) -> None:
    tokens = byte_level_metadata["tokenizer.ggml.tokens"]
    bos, eos = tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")

    def ids(**changes: bool | str) -> list[int]:
        changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return Tokenizer(gguf_vocabulary({**byte_level_metadata, **changed})).encode("")

    assert ids() == []
    assert ids(add_bos_token=True) == [bos]
    assert ids(add_bos_token=True, add_eos_token=True) == [bos, eos]
    assert ids(pre="llama-bpe") == [bos]
    assert ids(pre="llama-bpe", add_bos_token=False) == []


def test_doubles_and_empty_tokens_are_kept_apart(byte_level_metadata: dict[str, Any]) -> None:
    tokens = [*byte_level_metadata["tokenizer.ggml.tokens"], "a", ""]
    kinds = [*byte_level_metadata["tokenizer.ggml.token_type"], 1, 1]
    changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    tokenizer = Tokenizer(gguf_vocabulary({**byte_level_metadata, **changed}))
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode("a") == [len(tokens) - 2]
    assert tokenizer.decode(tokenizer.encode("abc a")) == "abc a"


def test_large_merges_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    monkeypatch.setattr(merges, "_LEAST_KEPT", 3)
    ids, scores = {"a": 0, "b": 1, "ab": 2, "abb": 3}, [0.0, 0.0, -1.0, -2.0]
    found = array("I", [0, 1, 2, 1])
    assert merges.sentencepiece_merges(ids, scores) == found
    (kept,) = (tmp_path / "tokenizers").iterdir()
    whole = kept.read_bytes()

    kept.write_bytes(whole[:32] + b"\0" * 16)  # broken: found anew
    assert merges.sentencepiece_merges(ids, scores) == found
    assert kept.read_bytes() == whole
    for broken in (b"", whole[:-1], whole + b"\0" * 8):
        kept.write_bytes(broken)
        assert merges.sentencepiece_merges(ids, scores) == found

    # Anything else is another file.
    assert merges.sentencepiece_merges(ids, [0.0, 0.0, -2.0, -1.0]) == array("I", [2, 1, 0, 1])
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2

    # What was kept is what is used.
    monkeypatch.setattr(merges, "_find", lambda *_: pytest.fail("not read back"))
    assert merges.sentencepiece_merges(ids, scores) == found


def test_an_unwritable_cache_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizers").write_text("a file where the folder should be")
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    monkeypatch.setattr(merges, "_LEAST_KEPT", 1)
    assert merges.sentencepiece_merges({"a": 0, "aa": 1}, [0.0, 1.0]) == array("I", [0, 0])
