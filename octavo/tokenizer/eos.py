"""eos_token_ids: which tokens end a model's answers, without loading a tokenizer.

For the engine process, which knows ids and no text: imports neither the tokenizers library nor
jinja2.
"""

from __future__ import annotations

import os
from pathlib import Path

from octavo.tokenizer.folder_files import folder_eos_token_ids
from octavo.tokenizer.gguf_metadata import gguf_eos_token_ids
from octavo.weights.gguf import GGUFFile


def eos_token_ids(path: str | os.PathLike[str]) -> frozenset[int]:
    """The ids that end a model's answers, from the metadata of its GGUF file or folder.

    Raises:
        ModelFileError: a file is missing or broken.
    """
    path = Path(path)
    if path.is_dir():
        return folder_eos_token_ids(path)
    with GGUFFile.open(path) as file:
        return gguf_eos_token_ids(file.metadata)
