"""What the small JSON files of a model folder say: chat template, special tokens, eos ids.

Imports neither the tokenizers library nor jinja2 (see `gguf_metadata`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ModelFileError

_VARIABLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def folder_eos_token_ids(folder: Path) -> frozenset[int]:
    """Ids that end an answer: generation_config.json's, else config.json's, else the eos token."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        for section in (config, config.get("text_config")):
            ids = section.get("eos_token_id") if isinstance(section, dict) else None
            found = ids if isinstance(ids, list) else [ids]
            if all(isinstance(token_id, int) and token_id >= 0 for token_id in found) and found:
                return frozenset(found)
    eos = folder_variables(folder).get("eos_token")
    added = _read_json(folder / "tokenizer.json").get("added_tokens") or [] if eos else []
    return frozenset(int(entry["id"]) for entry in added if entry.get("content") == eos)


def folder_template(folder: Path) -> str | None:
    """The folder's chat template: chat_template.jinja, else the one in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def folder_variables(folder: Path) -> dict[str, str]:
    """The texts that a chat template knows by name: bos_token, eos_token and so on."""
    config = _read_json(folder / "special_tokens_map.json")
    config.update(_read_json(folder / "tokenizer_config.json"))
    found = {}
    for name in _VARIABLES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _read_text(path: Path) -> str:
    """A file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ModelFileError(f"{path} cannot be read: {fault}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except ValueError as fault:
        raise ModelFileError(f"{path} is not valid JSON: {fault}") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return content
