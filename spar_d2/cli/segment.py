"""Segment images and videos into given classes, or the classes of a trained model, and draw the results."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

import spar_d2  # noqa: F401  registers
from spar_d2.cli.flags import add_opts, output_override
from spar_d2.data.build import MASK_TRANSFORMER, PANOPTIC_FPN
from spar_d2.demo.exports import FORMATS, Exports, check_formats
from spar_d2.demo.inputs import find_inputs
from spar_d2.demo.outputs import is_file_name, plan_outputs
from spar_d2.demo.panoptic import SEMANTIC, build_demo, check_new_classes, is_panoptic
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
        help='images, videos, folders (searched recursively), tar files of images, or patterns ("photos/*.jpg")',
    )
    add(
        "--vocabulary",
        default="",
        metavar="CLASSES",
        help='classes to segment: "cat, kitten; dog; sky" (synonyms after commas), a file with one class per line, or '
        f"one of {', '.join(Vocabulary.built_in())}; for panoptic models with a text classifier "
        '"things: cat, kitten; dog; stuff: sky", or a file with these headings (default: MODEL.SPAR.VOCABULARY)',
    )
    add("--panoptic", action="store_true", help="fail if the model of the config gives no panoptic segmentations")
    add(
        "--examples",
        default="",
        metavar="FILE",
        help="examples file (*.yaml) that defines the classes by regions of images, instead of --vocabulary",
    )
    add(
        "--output",
        default="output/segmented",
        metavar="PATH",
        help="output folder, or output file for a single input (default: %(default)s)",
    )
    add(
        "--config-file",
        default=get_config_file("segment/openclip_vit_b_16.yaml"),
        metavar="FILE",
        help="config of encoder and weights (default: %(default)s)",
    )
    add(
        "--weights",
        default="",
        metavar="FILE",
        help="weights of a distilled student, instead of the pre-trained weights, or of a trained model",
    )
    add(
        "--show",
        nargs="+",
        choices=SHOWN,
        default=["overlay"],
        metavar="WHAT",
        help='"overlay": segmentation over the image, "pca": features as PCA colors; both are drawn side by side '
        "(default: overlay)",
    )
    add("--alpha", type=float, default=0.55, help="opacity of the class colors, 0..1 (default: %(default)s)")
    add("--masks", action="store_true", help="also write label maps as NAME_mask.png or NAME_masks/000001.png ...")
    add("--json", action="store_true", help="also write the classes found and their areas as NAME.json")
    add(
        "--export",
        nargs="+",
        choices=FORMATS,
        default=[],
        metavar="FORMAT",
        help=f"also write {', '.join(FORMATS)}; coco and labelstudio are one file for all images",
    )
    add("--min-area", type=int, default=0, metavar="PIXELS", help="leave out smaller regions in exported files")
    add_opts(parser, "such as INPUT.MIN_SIZE_TEST 1024")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    show_warnings()
    # File names may contain bytes that cannot be decoded.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with readable_errors():
        sources = find_inputs(args.input, args.output)
        # Feature images get a suffix, so that they do not overwrite the overlays of an earlier run.
        suffix = "" if "overlay" in args.show else "_pca"
        check_formats(args.export, sources, args.json)
        masks = args.masks or "masks" in args.export
        targets = plan_outputs(sources, args.output, suffix, masks, args.json, args.export)
        cfg = config(args)
        print(f"Loading {cfg.MODEL.SPAR.ENCODER} on {cfg.MODEL.DEVICE} ...", flush=True)
        demo = build_demo(cfg, args.show, args.weights, bool(masks or args.json or args.export), args.alpha)
        exports = Exports(args.export, sources, targets, args.output, demo.names, args.min_area)
        try:
            tally = run(demo, sources, targets, exports if args.export else None)
        except KeyboardInterrupt:
            raise SystemExit(f"\nstopped; finished outputs are in {args.output}") from None
        print(printable(str(tally)))
    if not tally.done:
        raise SystemExit(1)


def config(args: argparse.Namespace) -> CfgNode:
    """Load the config with the overrides of all flags, and warn if the model has random weights."""
    if args.weights and not Path(args.weights).is_file():
        raise FileNotFoundError(f"--weights: there is no file {args.weights}")
    folder = Path(args.output).parent if is_file_name(args.output) else args.output
    overrides = [*args.opts, *output_override(folder)]
    if args.examples:
        if args.vocabulary:
            raise ValueError("--examples and --vocabulary must not be used together: both define the classes")
        if not args.examples.lower().endswith((".yaml", ".yml")):
            raise ValueError(f"--examples must be an examples file (*.yaml), got {args.examples}")
        args.vocabulary = args.examples
    if args.vocabulary:
        # Quoted as the output folder.
        overrides += ["MODEL.SPAR.VOCABULARY", repr(args.vocabulary)]
    cfg = load_config(args.config_file, overrides)
    kind, panoptic = cfg.MODEL.META_ARCHITECTURE, is_panoptic(cfg)
    trained = panoptic or kind == MASK_TRANSFORMER or kind in SEMANTIC
    if args.panoptic and not panoptic:
        raise ValueError(
            f"--panoptic: --config-file must have a panoptic model, {PANOPTIC_FPN} or {MASK_TRANSFORMER} with "
            f"MODEL.MASK_TRANSFORMER.TASK panoptic, and --weights its checkpoint; got a config of {kind}"
        )
    if args.vocabulary and trained:
        _check_vocabulary(args, cfg)
    if panoptic and set(args.export) - {"masks"}:
        raise ValueError(f"--export: only masks can be exported of a panoptic model, got {' '.join(args.export)}")
    if not (cfg.MODEL.WEIGHTS or args.weights or (cfg.MODEL.SPAR.PRETRAINED and not trained)):
        advice = "use --weights" if trained else "set MODEL.SPAR.PRETRAINED or use --weights"
        logging.getLogger("spar_d2.demo").warning("The weights are random, so the results are meaningless: %s", advice)
    return cfg


def _check_vocabulary(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Raise ``ValueError`` for a vocabulary that a trained model cannot use."""
    flag = "--examples" if args.examples else "--vocabulary"
    check_new_classes(cfg, flag)
    if args.vocabulary.lower().endswith((".yaml", ".yml")):
        raise ValueError(f"{flag}: the classes of {MASK_TRANSFORMER} must be words, got the examples {args.vocabulary}")


class BesideBars(logging.Handler):
    """Logging handler that prints to stderr without breaking progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr)


def show_warnings() -> None:
    """Print the warnings of spar_d2, Detectron2 and fvcore."""
    for name in ("spar_d2", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.handlers = [BesideBars(logging.WARNING)]
        logger.propagate = False
