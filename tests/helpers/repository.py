"""A copy of the repository in which `make book` can run with other data."""

import shutil
import sys
from pathlib import Path

from lmm_sae_nb.support.notebooks import REPOSITORY

MADE = ("__pycache__", "_build", "*.ipynb", "results.md", "features.md", "api.md", "reference", "features")


def copy_repository(folder: Path) -> Path:
    """Copy what `make book` needs, but nothing that it makes; link the models, and this Python as `.venv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("lmm_sae_nb", "notebooks", "book"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns(*MADE))
    for name in ("dodo.py", "Makefile", "constraints.txt", "pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy2(REPOSITORY / name, folder)
    (folder / "data").mkdir()
    for name in ("data/models", "data/pictureworld"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder
