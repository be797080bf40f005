"""Segment photos and videos into the classes that you name, or that a panoptic model has, and draw the result."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

import spar_d2  # noqa: F401  registers
from spar_d2.data.build import PANOPTIC_FPN
from spar_d2.demo.inputs import find_inputs
from spar_d2.demo.outputs import is_file_name, plan_outputs
from spar_d2.demo.panoptic import build_demo
from spar_d2.demo.predictor import EXAMPLE, SHOWN
from spar_d2.demo.run import run
from spar_d2.engine.setup import load_config
from spar_d2.model_zoo import get_config_file
from spar_d2.text import Vocabulary
from spar_d2.utils.errors import printable, readable_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"example: spar-d2 segment --input photos {EXAMPLE}")
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help='photos, videos, folders with such in them or below, tar files of photos, or patterns ("photos/*.jpg")',
    )
    add(
        "--vocabulary",
        default="",
        metavar="WORDS",
        help='classes to look for: "cat, kitten; dog; sky" (synonyms after commas), a file with one class a line, or '
        f"one of {', '.join(Vocabulary.built_in())} (default: those of the config)",
    )
    add(
        "--output",
        default="output/segmented",
        metavar="PATH",
        help="a folder, or for a single input a file (default: %(default)s)",
    )
    add(
        "--config-file",
        default=get_config_file("segment/openclip_vit_b_16.yaml"),
        metavar="FILE",
        help="encoder and weights (default: %(default)s)",
    )
    add(
        "--weights",
        default="",
        metavar="FILE",
        help="a distilled student, in place of the pre-trained weights, or a panoptic model",
    )
    add(
        "--show",
        nargs="+",
        choices=SHOWN,
        default=["overlay"],
        metavar="WHAT",
        help='"overlay": classes over the photo, "pca": features as colors; with both they are side by side '
        "(default: overlay)",
    )
    add("--alpha", type=float, default=0.55, help="opacity of the classes' colors, 0..1 (default: %(default)s)")
    add("--masks", action="store_true", help="also write class numbers, as NAME_mask.png or NAME_masks/000001.png ...")
    add("--json", action="store_true", help="also write the classes found and their areas, as NAME.json")
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys to override, such as INPUT.MIN_SIZE_TEST 1024; the last flag",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    show_warnings()
    # File names may hold bytes that are no text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with readable_errors():
        sources = find_inputs(args.input, args.output)
        # The features alone go beside an overlay of an earlier run.
        ending = "" if "overlay" in args.show else "_pca"
        targets = plan_outputs(sources, args.output, ending, args.masks, args.json)
        cfg = config(args)
        print(f"Loading {cfg.MODEL.SPAR.ENCODER} on {cfg.MODEL.DEVICE} ...", flush=True)
        demo = build_demo(cfg, args.show, args.weights, args.masks or args.json, args.alpha)
        try:
            tally = run(demo, sources, targets)
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped; what was finished is in {args.output}") from None
        print(printable(str(tally)))
    if not tally.done:
        raise SystemExit(1)


def config(args: argparse.Namespace) -> CfgNode:
    """The config under all flags, with a warning where its model means nothing."""
    if args.weights and not Path(args.weights).is_file():
        raise FileNotFoundError(f"--weights: there is no file {args.weights}")
    folder = Path(args.output).parent if is_file_name(args.output) else args.output
    # Quoted, as words such as "2024" would be taken for numbers.
    overrides = [*args.opts, "OUTPUT_DIR", repr(str(folder))]
    if args.vocabulary:
        overrides += ["MODEL.SPAR.VOCABULARY", repr(args.vocabulary)]
    cfg = load_config(args.config_file, overrides)
    panoptic = cfg.MODEL.META_ARCHITECTURE == PANOPTIC_FPN
    if panoptic and args.vocabulary:
        raise ValueError(f"--vocabulary: a {PANOPTIC_FPN} has the classes that it was trained on; leave it out")
    if not (cfg.MODEL.WEIGHTS or args.weights or (cfg.MODEL.SPAR.PRETRAINED and not panoptic)):
        remedy = "give --weights" if panoptic else "set MODEL.SPAR.PRETRAINED or give --weights"
        logging.getLogger("spar_d2.demo").warning("The weights are random, so what is shown means nothing: %s", remedy)
    return cfg


class BesideBars(logging.Handler):
    """Prints records on stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr)


def show_warnings() -> None:
    for name in ("spar_d2", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.handlers = [BesideBars(logging.WARNING)]
        logger.propagate = False
