"""Prepare the labels of data sets, from their official archives unpacked in one folder.

Without a NAME it shows what is there. Labels that are prepared already are kept, so that it can be stopped and started
again. docs/datasets.md says which archives go where.
"""

from __future__ import annotations

import argparse

from spar_d2.data.preparation import MissingArchive, prepare, survey
from spar_d2.data.preparation.common import datasets_root
from spar_d2.data.preparation.registry import GROUPS, PREPARATIONS
from spar_d2.utils.errors import readable_errors

ALL = "all"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = "; of several, those whose official files are there: "
    several += ", ".join(f"{group} ({', '.join(names)})" for group, names in GROUPS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PREPARATIONS)}{several}, {ALL}")
    parser.add_argument(
        "--root", metavar="DIR", help="folder of all data sets (default: $DETECTRON2_DATASETS, datasets)"
    )
    parser.add_argument("--partial", action="store_true", help="also where images or labels are missing")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one for each CPU)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        with readable_errors():
            if not args.names:
                print(table(args.root))
            for name in chosen(args.names, args.root):
                done = prepare(name, args.root, args.partial, args.workers)
                print(f"{name}: {done.written} labels written, {done.images - done.written} were there; {done.folder}")
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from there") from None


def chosen(names: list[str], root: str | None) -> list[str]:
    """The data sets that names on the command line stand for, each once; says which are left out of a name for several.

    Raises:
        MissingArchive: nothing is there of those that a name stands for.
        ValueError: a name is none of them, or nothing is there of any.
    """
    known = [*PREPARATIONS, *GROUPS, ALL]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"NAME must be one of {', '.join(known)}; got {wrong[0]!r}")
    found = []
    if ALL in names:
        found = there(list(PREPARATIONS), root)
        if not found:
            raise ValueError(f"no official files of any data set are in {datasets_root(root)}")
    for name in names:
        if name in GROUPS:
            members = there(list(GROUPS[name]), root)
            if not any(member.startswith(name) for member in members):
                state = survey(GROUPS[name][-1], root)
                raise MissingArchive(state.reason, state.missing[0])
            found += members
        elif name != ALL:
            found.append(name)
    return list(dict.fromkeys(found))


def there(names: list[str], root: str | None) -> list[str]:
    """Those of several data sets whose official files are there; the others are printed."""
    states = [survey(name, root) for name in names]
    for state in states:
        if state.missing:
            print(f"{state.name}: left out, {state.advice}")
    return [state.name for state in states if not state.missing]


def table(root: str | None) -> str:
    """What is there of every data set, and what to do."""
    rows = [("data set", "images", "prepared", "to do")]
    for name in PREPARATIONS:
        state = survey(name, root)
        rows.append((name, f"{state.images}/{state.expected}", str(state.prepared), state.advice or "-"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([f"In {datasets_root(root)}:", *lines])
