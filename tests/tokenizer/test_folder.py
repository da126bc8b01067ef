"""Folders with tokenizer.json: equal to the library and to transformers, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from octavo.errors import ModelFileError
from octavo.tokenizer.load import eos_token_ids, load_tokenizer
from octavo.types import Span

SPECIALS = ["<unk>", "<s>", "</s>", "<|x|>"]
MIXED = [
    "a <s>b</s> c",
    "<s>",
    "  <|x|>  x <tag> y",
    "no specials at all",
    "",
    " lead <s> ing",
    "<|x",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def legacy() -> Tokenizer:
    """As converters write Llama 2's: spaces by the normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As converters write Mistral's: a space before the first word only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


KINDS = {"byte_level": byte_level, "legacy": legacy, "metaspace": metaspace}


@pytest.fixture(scope="session", params=KINDS)
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> Path:
    """A model folder with a small tokenizer of one kind."""
    tokenizer = KINDS[request.param]()
    is_byte_level = request.param == "byte_level"
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[] if is_byte_level else ["<unk>", *(f"<0x{b:02X}>" for b in range(256))],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if is_byte_level else [],
        limit_alphabet=300,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []  # the byte tokens are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    bos, eos = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    path = tmp_path_factory.mktemp(request.param)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": "{{ bos_token }}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_equals_the_library(folder: Path, texts: list[str]) -> None:
    ours = load_tokenizer(folder)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.encode_special_tokens = True
    for text in [*texts, *MIXED]:
        assert ours.encode(text, parse_special=True) == theirs.encode(text).ids
        assert ours.encode(text) == bare.encode(text).ids
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_spans([Span(text, True)]) == ids
        if "\ufffd" not in theirs.decode(ids):
            assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, skip_special_tokens=False
        )


def test_equals_transformers(folder: Path, texts: list[str]) -> None:
    ours = load_tokenizer(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in [*texts, *MIXED]:
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
    assert ours.vocab_size == len(theirs)


def test_typed_special_tokens_are_text_and_the_rest_is_unchanged(folder: Path) -> None:
    """Cut at the template's special tokens by us, or by the library: the same ids."""
    ours = load_tokenizer(folder)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ["<s>a b</s> c", "a <mask> b", "x<s><s> y <tag> z", " a<|x|>\n", "a", "<s>"]:
        whole = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode_spans([Span(text, True), Span("", False)]) == whole
        typed = ours.encode_spans([Span(text, True), Span("</s>", False)])
        specials = [i for i in typed if i in ours.special_ids]
        assert specials == [i for i in whole if i in ours.special_ids]
        assert ours.decode(typed, skip_special_tokens=False).endswith("</s>")


def test_special_tokens_of_the_folder(folder: Path) -> None:
    ours = load_tokenizer(folder)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ours.bos_token_id == theirs.token_to_id("<s>")
    assert ours.eos_token_ids == {theirs.token_to_id("</s>")} == eos_token_ids(folder)
    assert theirs.token_to_id("<tag>") not in ours.special_ids
    assert ours.chat_template is not None
    assert ours.chat_template.render([]) == [Span("<s>", True)]
    assert ours.token_text(theirs.token_to_id("<|x|>")) == "<|x|>"


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [7, 8]}, "config": {"eos_token_id": 9}}, {7, 8}),
        ({"generation_config": {"eos_token_id": 7}}, {7}),
        ({"generation_config": {}, "config": {"eos_token_id": 9}}, {9}),
        ({"config": {"text_config": {"eos_token_id": [5]}}}, {5}),
        (
            {
                "tokenizer_config": {"eos_token": "<e>"},
                "tokenizer": {"added_tokens": [{"id": 4, "content": "<e>"}]},
            },
            {4},
        ),
        ({"config": {"eos_token_id": None}}, set()),
        ({}, set()),
    ],
)
def test_where_eos_ids_come_from(tmp_path: Path, files: Any, expected: set[int]) -> None:
    assert eos_token_ids(write(tmp_path, **files)) == expected


def test_where_templates_come_from(folder: Path, tmp_path: Path) -> None:
    def source(**config: object) -> str | None:
        write(tmp_path, tokenizer_config=config)
        template = load_tokenizer(tmp_path).chat_template
        return None if template is None else template.source

    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert source() is None
    assert source(chat_template="one") == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert source(chat_template=named) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert source(chat_template="one") == "file"


def test_broken_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is broken"):
        load_tokenizer(tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text())
    write(tmp_path, tokenizer={**description, "decoder": None})
    with pytest.raises(ModelFileError, match="decoder that Octavo does not know"):
        load_tokenizer(tmp_path)
    write(tmp_path, tokenizer=description)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="is not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="is not valid JSON"):
        load_tokenizer(tmp_path)
