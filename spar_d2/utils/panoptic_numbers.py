"""Class indices of PanopticFPN for a panoptic data set, from its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THINGS, STUFF = "thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"
# Name of Detectron2's stuff class that represents all things.
_ALL_THINGS = "things"


@dataclass(frozen=True)
class SeparateNumbers:
    """Separate indices of thing and stuff classes, in the order of the contiguous ids of the data set.

    Thing indices start from 0. Stuff indices start from 1, because stuff class 0 represents all things.

    Attributes:
        things, stuff: maps contiguous ids of the data set to PanopticFPN's indices.
        own_things, own_stuff: maps PanopticFPN's indices to category ids of the data set.
    """

    things: Mapping[int, int]
    stuff: Mapping[int, int]
    own_things: Mapping[int, int]
    own_stuff: Mapping[int, int]


def separate_numbers(name: str, metadata: Mapping[str, Any]) -> SeparateNumbers:
    """Compute the indices of a data set, whose contiguous ids may be shared by things and stuff or separate.

    Args:
        name: name of the data set, for error messages.
        metadata: metadata with ``thing_dataset_id_to_contiguous_id`` and ``stuff_dataset_id_to_contiguous_id``, which
            map category ids of the data set to contiguous ids.

    Raises:
        ValueError: one of the two entries is missing.
    """
    missing = [key for key in (THINGS, STUFF) if not isinstance(metadata.get(key), Mapping)]
    if missing:
        raise ValueError(
            f"the data set {name!r} has no {' and no '.join(missing)} in its metadata: register it with both, each a "
            "dict from the category ids in its JSON file to contiguous class indices starting from 0"
        )
    all_things = list(metadata.get("stuff_classes") or ())[:1] == [_ALL_THINGS]
    things = {number: category for category, number in metadata[THINGS].items()}
    stuff = {number: category for category, number in metadata[STUFF].items() if number or not all_things}
    thing_indices = {number: index for index, number in enumerate(sorted(things))}
    stuff_indices = {number: index for index, number in enumerate(sorted(stuff), start=1)}
    return SeparateNumbers(
        thing_indices,
        stuff_indices,
        {index: things[number] for number, index in thing_indices.items()},
        {index: stuff[number] for number, index in stuff_indices.items()},
    )


def class_values(values: Sequence[Any], contiguous: Mapping[int, int]) -> list[Any]:
    """Return the entries of a list in the metadata, such as "thing_classes", for the things or the stuff of a data set.

    Args:
        values: list with an entry for each contiguous id, or only for each class.
        contiguous: ``things`` or ``stuff`` of :class:`SeparateNumbers`.

    Returns:
        An entry for each class, in order; None where the list has another length.
    """
    numbers = sorted(contiguous)
    if numbers and len(values) > numbers[-1]:
        return [values[number] for number in numbers]
    return list(values) if len(values) == len(numbers) else [None] * len(numbers)
