"""Measure what takes too long for a page, and write the numbers into book/*.json."""

from __future__ import annotations

import argparse

from lmm_sae_nb.benchmarks import ablations, cache_opening, comparison, faults, gpu, panel, seeds

COMMANDS = {
    "training": comparison,
    "ablations": ablations,
    "cache-opening": cache_opening,
    "seeds": seeds,
    "panel": panel,
    "gpu": gpu,
    "faults": faults,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n\n")[0].replace("\n", " ")
        module.add_options(commands.add_parser(name, help=summary, description=module.__doc__))
    options = parser.parse_args(arguments)
    COMMANDS[options.command].main(options)


if __name__ == "__main__":
    main()
