"""Draw the predictions of a trained model beside the ground truth of a data set.

The model is a segmentor with its vocabulary (pre-trained or a student), a linear probe, or a panoptic model. Pictures
have the ground truth on the left and the prediction on the right; overview.png shows all images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.data import DatasetCatalog
from PIL import Image
from tqdm import tqdm

import spar_d2  # noqa: F401  registers
from spar_d2.cli.flags import add_opts, output_override
from spar_d2.cli.segment import show_warnings
from spar_d2.demo.ground_truth import draw_beside_truth, truth_reader
from spar_d2.demo.panoptic import build_demo
from spar_d2.engine.setup import load_config
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import atomic_write
from spar_d2.utils.selection import evenly_spread
from spar_d2.visualization import draw_panels
from spar_d2.visualization.palette import IGNORED, IGNORED_COLOR

# Classes in the legend of the overview; more would not be readable.
_LONGEST_LEGEND = 28
# Images in the overview.
_MOST_ROWS = 12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="config of the model, as in its training")
    add("--weights", default="", metavar="FILE", help="checkpoint or student (default: MODEL.WEIGHTS)")
    add("--dataset", default="", metavar="NAME", help="registered data set (default: the first of DATASETS.TEST)")
    add("--count", type=int, default=8, metavar="N", help="number of images (default: %(default)s)")
    add("--alpha", type=float, default=0.55, help="opacity of the class colors, 0..1 (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("output/visualize"),
        metavar="DIR",
        help="output folder (default: %(default)s)",
    )
    add_opts(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    show_warnings()
    with readable_errors():
        if args.count < 1:
            raise ValueError(f"--count must be at least 1, got {args.count}")
        if args.weights and not Path(args.weights).is_file():
            raise FileNotFoundError(f"--weights: there is no file {args.weights}")
        run(args)


def run(args: argparse.Namespace) -> None:
    overrides = [*args.opts, *output_override(args.output)]
    overrides += ["DATASETS.TEST", str((args.dataset,))] if args.dataset else []
    cfg = load_config(args.config_file, overrides)
    if not cfg.DATASETS.TEST:
        raise ValueError("--dataset must name a registered data set, because DATASETS.TEST is empty")
    name = cfg.DATASETS.TEST[0]
    assert name in DatasetCatalog  # load_config checks it
    demo = build_demo(cfg, ["overlay"], args.weights, labels=True, alpha=args.alpha)
    read, records = truth_reader(demo, name), evenly_spread(DatasetCatalog.get(name), args.count)
    rows, present = [], set()
    for index, record in enumerate(tqdm(records, desc="drawing", unit="image", leave=False), start=1):
        row, both, classes = draw_beside_truth(demo, record, read)
        rows.append(row)
        present |= classes
        with atomic_write(args.output / f"{index:03d}_{Path(record['file_name']).stem}.png") as temporary:
            Image.fromarray(both).save(temporary, format="PNG")
    names, colors = [*demo.names, IGNORED], [*demo.colors, IGNORED_COLOR]
    legend = {names[number]: colors[number] for number in sorted(present)}
    shown = rows[:_MOST_ROWS]
    titles = ["image", "ground truth", "prediction"]
    draw_panels(shown, titles, args.output / "overview.png", legend if len(legend) <= _LONGEST_LEGEND else None)
    print(printable(f"{len(rows)} pictures of {name} and overview.png are in {args.output}."))
