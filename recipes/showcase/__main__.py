"""`make showcase`: train on real data with the defaults, compare, and write the results as a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...errors import OmnimixError
from ...utils.console import emit, say, write_atomically
from .images import DATA
from .measure import images, page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m omnimix.recipes.showcase", description=__doc__)
    parser.add_argument("data", nargs="*", help=f"data sets, of {', '.join(DATA)}; all by default")
    parser.add_argument("--runs", default="runs/showcase", help="where the runs go")
    parser.add_argument("--page", help="write the results into this page")
    parser.add_argument("--no-peers", action="store_true", help="leave timm's models out")
    options = parser.parse_args()
    if unknown := set(options.data) - set(DATA):
        parser.error(f"unknown data set {min(unknown)!r}; there are {', '.join(DATA)}")
    try:
        names = tuple(options.data) or tuple(DATA)
        rows = images(Path(options.runs), names=names, compare=not options.no_peers)
    except OmnimixError as error:
        say(f"error: {error}", error=True)
        return 2
    emit("results on real data, one thread", rows)
    if options.page:
        write_atomically(options.page, page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
