"""COCO JSON: images, categories, and an annotation with a run-length encoded mask for each region."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spar_d2.results.regions import Region, shown_names

# Marks a file as written by this package.
MARK = "spar_d2"


def coco_categories(names: Sequence[str]) -> list[dict]:
    """Return the categories. Category k + 1 is class k, because many programs take category 0 for no category."""
    return [{"id": index + 1, "name": name, "supercategory": ""} for index, name in enumerate(shown_names(names))]


def coco_image(image_id: int, file_name: str, size: tuple[int, int]) -> dict:
    """Return the entry of an image of ``size`` (H, W)."""
    return {"id": image_id, "file_name": file_name, "width": size[1], "height": size[0]}


def coco_annotations(regions: Iterable[Region], image_id: int, first: int = 1) -> list[dict]:
    """Return an annotation for each region, with ids from ``first`` on. Those with a score have "score"."""
    return [_annotation(region, image_id, number) for number, region in enumerate(regions, start=first)]


def _annotation(region: Region, image_id: int, number: int) -> dict:
    x0, y0, x1, y1 = region.box
    score = {} if region.score is None else {"score": region.score}
    return {
        "id": number,
        "image_id": image_id,
        "category_id": region.number + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": region.area,
        "segmentation": region.rle(),
        "iscrowd": 0,
        **score,
    }
