"""load_tokenizer: from a model's path to its Tokenizer; eos_token_ids without building one.

A GGUF file's own metadata is enough; a folder brings tokenizer.json and its companions. Imports no
numpy.
"""

from __future__ import annotations

import os
from pathlib import Path

from octavo.errors import ModelFileError
from octavo.tokenizer.chat_template import ChatTemplate
from octavo.tokenizer.eos import eos_token_ids
from octavo.tokenizer.folder_files import folder_template, folder_variables
from octavo.tokenizer.folder_vocabulary import folder_vocabulary
from octavo.tokenizer.gguf_metadata import gguf_variables
from octavo.tokenizer.gguf_vocabulary import gguf_vocabulary
from octavo.tokenizer.tokenizer import Tokenizer
from octavo.weights.gguf import GGUFFile

__all__ = ["Tokenizer", "eos_token_ids", "load_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer and chat template of a model.

    Args:
        path: a GGUF file (a FILE.jinja beside FILE.gguf replaces its chat template), or a folder
            with tokenizer.json.

    Raises:
        ModelFileError: a file is missing or broken, or describes a tokenizer of an unsupported
            kind.
    """
    path = Path(path)
    if path.is_dir():
        vocabulary = folder_vocabulary(path)
        source = folder_template(path)
        variables = folder_variables(path)
    else:
        with GGUFFile.open(path) as file:
            vocabulary = gguf_vocabulary(file.metadata)
            found = file.metadata.get("tokenizer.chat_template")
            source = _beside(path) or (found if isinstance(found, str) else None)
            variables = gguf_variables(file.metadata)
    template = ChatTemplate(source, vocabulary.specials, variables) if source else None
    return Tokenizer(vocabulary, template)


def _beside(path: Path) -> str | None:
    """The text of FILE.jinja beside FILE.gguf, which replaces the file's own chat template."""
    try:
        return path.with_suffix(".jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path.with_suffix('.jinja')} cannot be read: {error}") from None
