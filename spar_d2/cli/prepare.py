"""Convert the labels of data sets from their official archives, unpacked in one folder.

Without NAME, the command shows the status of all data sets. Converted labels are kept, so the command can be stopped
and restarted at any time. docs/datasets.md lists the archives and where to unpack them.
"""

from __future__ import annotations

import argparse

from spar_d2.data.preparation import MissingArchive, prepare, survey
from spar_d2.data.preparation.registry import GROUPS, PREPARATIONS
from spar_d2.utils.environment import datasets_root
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.tables import format_table

ALL = "all"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = "; groups (data sets without official files are skipped): "
    groups += ", ".join(f"{group} ({', '.join(names)})" for group, names in GROUPS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PREPARATIONS)}{groups}, {ALL}")
    parser.add_argument(
        "--root", metavar="DIR", help="folder of all data sets (default: $DETECTRON2_DATASETS or datasets)"
    )
    parser.add_argument("--partial", action="store_true", help="convert even if some images or labels are missing")
    parser.add_argument("--workers", type=int, metavar="N", help="number of threads (default: one per CPU)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        with readable_errors():
            if not args.names:
                print(status_table(args.root))
            for name in chosen(args.names, args.root):
                done = prepare(name, args.root, args.partial, args.workers)
                existing = done.images - done.written
                print(f"{name}: {done.written} labels written, {existing} already existed; {done.folder}")
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run the same command again to continue") from None


def chosen(names: list[str], root: str | None) -> list[str]:
    """Expand names on the command line to data sets without duplicates; skipped members of groups are printed.

    Raises:
        MissingArchive: a group has no data set with official files on disk.
        ValueError: a name is unknown, or "all" finds no official files.
    """
    known = [*PREPARATIONS, *GROUPS, ALL]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"NAME must be one of {', '.join(known)}; got {unknown[0]!r}")
    selected = []
    if ALL in names:
        selected = there(list(PREPARATIONS), root)
        if not selected:
            raise ValueError(f"{datasets_root(root)} contains no official files of any data set")
    for name in names:
        if name in GROUPS:
            members = there(list(GROUPS[name]), root)
            if not any(member.startswith(name) for member in members):
                state = survey(GROUPS[name][-1], root)
                raise MissingArchive(state.reason, state.missing[0])
            selected += members
        elif name != ALL:
            selected.append(name)
    return list(dict.fromkeys(selected))


def there(names: list[str], root: str | None) -> list[str]:
    """Return the data sets whose official files are on disk, and print the others."""
    states = [survey(name, root) for name in names]
    for state in states:
        if state.missing:
            print(f"{state.name}: skipped, {state.advice}")
    return [state.name for state in states if not state.missing]


def status_table(root: str | None) -> str:
    """Return a status table of all data sets."""
    rows = []
    for name in PREPARATIONS:
        state = survey(name, root)
        rows.append((name, f"{state.images}/{state.expected}", str(state.prepared), state.advice or "-"))
    return f"In {datasets_root(root)}:\n{format_table(('data set', 'images', 'prepared', 'to do'), rows, 4, 'plain')}"
