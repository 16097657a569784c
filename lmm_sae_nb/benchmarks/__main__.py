"""Measure the training step of this package and of the peers, and write book/benchmarks.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from lmm_sae_nb.benchmarks.comparison import check_targets, renew
from lmm_sae_nb.support.files import project_root


def main() -> None:
    root = project_root()
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=root / "book" / "benchmarks.json")
    parser.add_argument(
        "--peers",
        type=Path,
        default=root / "build" / "peers",
        help="the peers' environment; created if absent",
    )
    options = parser.parse_args()
    for row in check_targets(renew(options.out, options.peers)["results"]):
        print(row)


if __name__ == "__main__":
    main()
