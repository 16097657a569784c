"""Write the data sets that the notebooks read, as the section `prepare` of a preset says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmm_sae_nb.prepare.recipe import read_recipe
from lmm_sae_nb.prepare.sources import open_source
from lmm_sae_nb.prepare.write import forecast, in_words, is_given, is_prepared, require_room, write_goal
from lmm_sae_nb.support.files import project_root
from lmm_sae_nb.support.presets import preset_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare a preset's data; what is there already stays as it is."""
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.prepare", description=__doc__)
    parser.add_argument("--preset", required=True, help="such as small, for notebooks/params/small.yaml")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="write only these entries, such as samples")
    parser.add_argument("--forecast", action="store_true", help="print how much it will be, and write nothing")
    options = parser.parse_args(arguments)
    root = project_root()
    try:
        _prepare(options, root)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _prepare(options: argparse.Namespace, root) -> None:
    goals, unreadable = read_recipe(preset_file(options.preset, root), root)
    if unknown := set(options.only or ()) - {goal.name for goal in goals}:
        raise ValueError(f"nothing is named {', '.join(sorted(unknown))}; there is {', '.join(g.name for g in goals)}")
    opened = []
    for goal in goals:
        if options.only and goal.name not in options.only:
            continue
        if is_given(goal):
            print(f"{goal.name}: {goal.folder} holds data of yours; nothing is written there", flush=True)
            continue
        if is_prepared(goal):
            print(f"{goal.name}: is there already, {goal.folder}", flush=True)
            continue
        streams = [open_source(source, root) for source in goal.sources]
        expected = forecast(goal, streams)
        print(f"{goal.name}: {in_words(expected)}, {goal.folder}", flush=True)
        opened.append((goal, streams, expected))
    if options.forecast:
        return
    for goal, streams, expected in opened:
        require_room(goal.folder, expected)
        done = write_goal(goal, streams, unreadable)
        held = f" and {done.heldout:,} held-out ones" if goal.heldout else ""
        print(f"{goal.name}: {done.rows:,} rows{held} in {goal.folder}", flush=True)
        asked = sum(source.heldout for source in goal.sources)
        if asked > done.heldout:
            print(f"  {asked:,} held-out rows were asked for; the files gave fewer", flush=True)
        for reason, number in done.reasons.items():
            print(f"  {number:,} records were left out: {reason}", flush=True)
        for place, reason in list(done.skipped.items())[:5]:
            print(f"  {place}: {reason}", flush=True)


if __name__ == "__main__":
    main()
