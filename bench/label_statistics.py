"""Simulations of the statistics that `cai` prints: size (how often a claim is made where nothing is there) and power (how
often it is made where something is). Every simulation has a fixed seed.

    python bench/label_statistics.py            # all of them
    python bench/label_statistics.py audit      # one
"""

import sys
from collections.abc import Callable

SIMULATIONS: dict[str, Callable[[], None]] = {}


def main() -> None:
    for name in sys.argv[1:] or SIMULATIONS:
        print(f"## {name}")
        SIMULATIONS[name]()


if __name__ == "__main__":
    main()
