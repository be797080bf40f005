"""The numbers that PanopticFPN has for the classes of a panoptic data set, from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

THINGS, STUFF = "thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"
# Detectron2's name for the class of stuff that stands for all things.
_ALL_THINGS = "things"


@dataclass(frozen=True)
class SeparateNumbers:
    """Things from 0 on and stuff from 1 on, where 0 stands for all things, in the order of their contiguous numbers.

    Attributes:
        things, stuff: PanopticFPN's number for each contiguous one of the data set.
        own_things, own_stuff: the data set's category for each of PanopticFPN's numbers.
    """

    things: Mapping[int, int]
    stuff: Mapping[int, int]
    own_things: Mapping[int, int]
    own_stuff: Mapping[int, int]


def separate_numbers(name: str, metadata: Mapping[str, Any]) -> SeparateNumbers:
    """Numbers for a data set in either of Detectron2's forms: things and stuff counted together, or apart.

    Args:
        name: of the data set, for errors.
        metadata: has, for the category ids of the data set, ``thing_dataset_id_to_contiguous_id`` and
            ``stuff_dataset_id_to_contiguous_id``.

    Raises:
        ValueError: one of the two is missing.
    """
    missing = [key for key in (THINGS, STUFF) if not isinstance(metadata.get(key), Mapping)]
    if missing:
        raise ValueError(
            f"the data set {name!r} has no {' and no '.join(missing)} in its metadata: register it with both, each a "
            "dict from the category ids in its JSON file to numbers of classes from 0 on"
        )
    all_things = list(metadata.get("stuff_classes") or ())[:1] == [_ALL_THINGS]
    things = {number: category for category, number in metadata[THINGS].items()}
    stuff = {number: category for category, number in metadata[STUFF].items() if number or not all_things}
    thing_numbers = {number: place for place, number in enumerate(sorted(things))}
    stuff_numbers = {number: place for place, number in enumerate(sorted(stuff), start=1)}
    return SeparateNumbers(
        thing_numbers,
        stuff_numbers,
        {place: things[number] for number, place in thing_numbers.items()},
        {place: stuff[number] for number, place in stuff_numbers.items()},
    )
