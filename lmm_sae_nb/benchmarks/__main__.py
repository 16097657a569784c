"""Measure the training step here and in the peers, and write book/benchmarks.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmm_sae_nb.benchmarks.comparison import bars, renew
from lmm_sae_nb.support.files import project_root


def main() -> None:
    root = project_root()
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=root / "book" / "benchmarks.json")
    parser.add_argument(
        "--peers", type=Path, default=root / "build" / "peers", help="their environment, made if absent"
    )
    asked = parser.parse_args()
    for row in bars(renew(asked.out, asked.peers)["results"]):
        print(row)


if __name__ == "__main__":
    main()
