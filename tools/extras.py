"""Print the requirements of one of Octavo's extras, a line each, for pip's command line."""

from __future__ import annotations

import pathlib
import sys
import tomllib

if __name__ == "__main__":
    project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
    sys.stdout.write("\n".join(project["optional-dependencies"][sys.argv[1]]) + "\n")
