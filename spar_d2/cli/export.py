"""Export an encoder for use without this package.

    spar-d2 export onnx --encoder ViT-B-16 --pretrained student.safetensors --output student.onnx --scores \\
        --vocabulary "cat, kitten; dog; sky" --check

writes student.onnx, which takes images of any size and any classes, student.json (patch size, pixel statistics,
classes) and student.safetensors (text embeddings).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.registry import build, check_has_text
from spar_d2.encoders.weight_files import files_of
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import check_not_read
from spar_d2.utils.tables import format_table

# Largest difference between onnxruntime and PyTorch, relative to the largest output.
TOLERANCE = 1e-4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = parser.add_subparsers(required=True, metavar="FORMAT")
    about = "one ONNX file for images of any size and, with --scores, for any classes"
    command = formats.add_parser("onnx", help=about, description=f"Export to {about}.")
    command.set_defaults(run=run_onnx)
    add = command.add_argument
    add("--encoder", required=True, metavar="NAME", help="model, as in MODEL.SPAR.ENCODER")
    add("--pretrained", default="", metavar="TAG_OR_FILE", help='weights, as in MODEL.SPAR.PRETRAINED ("": random)')
    add("--readout", default="", help="read-out, as in MODEL.SPAR.READOUT")
    add("--output", type=Path, required=True, metavar="FILE.onnx")
    add("--scores", action="store_true", help='add the input "text" (Q, D), and output scores instead of features')
    add(
        "--vocabulary",
        default="",
        help="classes whose text embeddings are written, too; see spar-d2 segment",
    )
    add("--templates", default="imagenet", help="prompt templates, as in MODEL.SPAR.TEMPLATES (default: %(default)s)")
    add("--check", action="store_true", help="compare the file with PyTorch at eight image sizes")
    add("--dinov3-repo", default="", metavar="DIR", help="clone of the dinov3 repository, for DINOv3.txt")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with readable_errors():
        return args.run(args)


def run_onnx(args: argparse.Namespace) -> int:
    """Export, and check if asked to; returns the exit code."""
    from spar_d2.export import export_onnx, write_classes
    from spar_d2.modeling.words import text_embeddings
    from spar_d2.text import Vocabulary

    if args.output.suffix != ".onnx":
        raise ValueError(f"--output must end with .onnx, got {args.output}")
    for path in files_of(args.pretrained):
        check_not_read(args.output, {"--pretrained": path})
    spec = EncoderSpec(args.encoder, args.pretrained, readout=args.readout, dinov3_repo=args.dinov3_repo)
    vocabulary = embeddings = None
    if args.vocabulary:
        check_has_text(args.encoder)
        vocabulary, embeddings = Vocabulary.load(args.vocabulary), text_embeddings(spec, args.templates, "", "cpu")
    encoder = build(spec)
    export_onnx(encoder, args.output, args.scores)
    written = [args.output, *write_classes(args.output, encoder, vocabulary, embeddings)]
    print(printable(f"Written: {', '.join(map(str, written))}"), flush=True)
    return check(args, encoder) if args.check else 0


def check(args: argparse.Namespace, encoder: DenseEncoder) -> int:
    """Print a comparison with PyTorch; returns 1 if they differ by more than rounding."""
    from spar_d2.export import check_sizes, compare

    found = list(compare(args.output, encoder, check_sizes(encoder)))
    rows = [
        [
            f"{c.size[1]}x{c.size[0]}",
            f"{c.difference:.1e}",
            f"{c.cosine:.6f}",
            f"{100 * c.same:.2f}",
            f"{c.seconds:.3f}",
            f"{c.torch_seconds / c.seconds:.2f}x",
        ]
        for c in found
    ]
    head = ["size", "largest difference", "smallest cosine", "same best, %", "seconds", "speed, ONNX / PyTorch"]
    print(format_table(head, rows))
    worst = max(c.difference for c in found)
    if worst > TOLERANCE:
        print(f"The outputs differ by {worst:.1e} of the largest output; at most {TOLERANCE:.0e} is rounding.")
    return int(worst > TOLERANCE)
