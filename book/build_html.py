"""Build the book's pages as `jupyter-book build` does, but with every core: that command offers no option for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jupyter_book.sphinx import build_sphinx


def build_html(book: Path) -> None:
    """Build `book` into its folder `_build/html`. A warning is an error, and so is a reference without a target.

    Raises:
        RuntimeError: there was a warning or an error. The cause is printed.
    """
    result = build_sphinx(
        book, book / "_build" / "html", path_config=book / "_config.yml", noconfig=True,
        confoverrides={"external_toc_path": str(book / "_toc.yml"), "latex_individualpages": False, "nitpicky": True},
        warningiserror=True, keep_going=True, quiet=True, jobs=os.cpu_count() or 1,
    )  # fmt: skip
    if result:  # a status that is not 0, or an exception
        raise RuntimeError(f"the pages of {book} could not be built ({result}); the cause is printed above")


if __name__ == "__main__":
    build_html(Path(sys.argv[1]).resolve())
