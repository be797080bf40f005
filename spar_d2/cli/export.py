"""Export an encoder, or a trained MaskTransformer, for use without this package.

    spar-d2 export onnx --encoder ViT-B-16 --pretrained student.safetensors --output student.onnx --scores \\
        --vocabulary "cat, kitten; dog; sky" --check

writes student.onnx, which takes images of any size and any classes, student.json (patch size, pixel statistics,
classes) and student.safetensors (text embeddings).

    spar-d2 export onnx --config-file config.yaml --weights model_final.pth --output model.onnx --check

writes a MaskTransformer with the outputs "class_logits" and "masks".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spar_d2.cli.flags import add_opts
from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.registry import build, check_has_text
from spar_d2.encoders.weight_files import files_of
from spar_d2.text import TextEmbeddings, Vocabulary
from spar_d2.utils.errors import printable, readable_errors
from spar_d2.utils.io import check_not_read
from spar_d2.utils.tables import format_table

if TYPE_CHECKING:
    from spar_d2.export import Comparison

# Largest difference between onnxruntime and PyTorch, relative to the largest output, and smallest share of equal
# labels; both in float32.
TOLERANCE, SAME = 1e-4, 0.999
_OUTPUTS = {
    "scores": 'add the input "text" (Q, D), and output scores instead of features',
    "labels": 'add the inputs "text" (Q, D) and "query_class" (Q,), and output the label of every pixel',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    formats = parser.add_subparsers(required=True, metavar="FORMAT")

    def command(name: str, about: str, run, output: str, random: str = ' ("": random)') -> argparse.ArgumentParser:
        command = formats.add_parser(name, help=about, description=f"Export to {about}.")
        command.set_defaults(run=run)
        add = command.add_argument
        add("--encoder", required=name != "onnx", metavar="NAME", help="model or its folder, as in MODEL.SPAR.ENCODER")
        add("--pretrained", default="", metavar="TAG_OR_FILE", help=f"weights, as in MODEL.SPAR.PRETRAINED{random}")
        add("--readout", default="", help="read-out, as in MODEL.SPAR.READOUT")
        add("--dinov3-repo", default="", metavar="DIR", help="clone of the dinov3 repository, for DINOv3.txt")
        add("--output", type=Path, required=True, metavar=output)
        return command

    onnx = command("onnx", "one ONNX file for images of any size", run_onnx, "FILE.onnx")
    program = command("torch", "a program of torch.export for images of any size", run_torch, "FILE.pt2")
    for parser_ in (onnx, program):
        chosen = parser_.add_mutually_exclusive_group()
        for kind, about in _OUTPUTS.items():
            chosen.add_argument(
                f"--{kind}", dest="kind", action="store_const", const=kind, default="features", help=about
            )
        _add_classes(parser_)
    onnx.add_argument("--check", action="store_true", help="compare the file with PyTorch at eight image sizes")
    onnx.add_argument("--config-file", default="", metavar="FILE", help="config of a MaskTransformer, not --encoder")
    onnx.add_argument("--weights", default="", metavar="FILE", help="checkpoint of the MaskTransformer")
    onnx.add_argument(
        "--free-classes",
        action="store_true",
        help='MaskTransformer with a text classifier: the classes are the inputs "text", "query_class" and "seen"',
    )
    needed = "; needed, unless --encoder is a model folder: random weights are refused"
    folder = command("folder", "a folder that is used like a model name", run_folder, "DIR", needed)
    folder.add_argument("--license", default="", help="license of the weights, for the model card")
    browser = command("browser", "a page that segments photos in the visitor's browser", run_browser, "DIR")
    _add_classes(browser, required=True)
    browser.add_argument("--words", action="store_true", help="also export the text tower: visitors type classes")
    browser.add_argument("--node-modules", default="", metavar="DIR", help="installed npm packages (default: download)")
    for parser_ in (onnx, browser):
        parser_.add_argument("--precision", default="float32", help="float32, float16 or int8 (default: %(default)s)")
    add_opts(onnx, "with --config-file")
    return parser.parse_args()


def _add_classes(parser: argparse.ArgumentParser, required: bool = False) -> None:
    add = parser.add_argument
    about = "classes whose text embeddings are written, too; see spar-d2 segment"
    add("--vocabulary", default="", required=required, help=about)
    add("--templates", default="", help="prompt templates, as in MODEL.SPAR.TEMPLATES (default: imagenet)")


def main() -> int:
    args = parse_args()
    with readable_errors():
        if args.encoder:
            args.spec = EncoderSpec(args.encoder, args.pretrained, readout=args.readout, dinov3_repo=args.dinov3_repo)
        return args.run(args) or 0


def run_onnx(args: argparse.Namespace) -> int:
    """Export to ONNX, and check if asked to; returns the exit code."""
    from spar_d2.export import export_onnx

    if bool(args.encoder) == bool(args.config_file):
        raise ValueError("either --encoder or --config-file must be given, to export an encoder or a MaskTransformer")
    if args.config_file:
        return _run_mask_transformer(args)
    for flag in ("weights", "free_classes", "opts"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} must be used with --config-file")
    _check_output(args, ".onnx")
    classes, encoder = _classes(args), build(args.spec)
    export_onnx(encoder, args.output, args.kind, args.precision)
    _report([args.output, *_write_classes(args, encoder, *classes)])
    return check(args, encoder) if args.check else 0


def _run_mask_transformer(args: argparse.Namespace) -> int:
    # Imports Detectron2, which the export of encoders does not need.
    from spar_d2.cli.export_mask_transformer import export

    _check_suffix(args, ".onnx")
    written, found = export(args)
    _report(written)
    return _judge(args, found) if found else 0


def run_torch(args: argparse.Namespace) -> None:
    """Export with ``torch.export``."""
    from spar_d2.export import export_program

    _check_output(args, ".pt2")
    classes, encoder = _classes(args), build(args.spec)
    export_program(encoder, args.output, args.kind)
    _report([args.output, *_write_classes(args, encoder, *classes)])


def run_folder(args: argparse.Namespace) -> None:
    """Export to a model folder."""
    from spar_d2.export import export_folder

    _report(export_folder(args.spec, args.output, args.license))


def run_browser(args: argparse.Namespace) -> None:
    """Export to a page."""
    from spar_d2.export.browser import export_browser

    vocabulary, embeddings = _classes(args)
    if vocabulary is None or embeddings is None:
        raise ValueError("--vocabulary must name the classes that visitors choose from")
    settings = (args.precision, args.spec.name if args.words else "", args.node_modules)
    written = export_browser(build(args.spec), args.output, vocabulary, embeddings, *settings)
    _report(written)
    size, server = sum(path.stat().st_size for path in written) / 1e6, "python -m http.server --bind 127.0.0.1"
    print(printable(f"{size:.1f} MB. Serve the folder, for example: {server} --directory {args.output}"))


def _check_suffix(args: argparse.Namespace, suffix: str) -> None:
    if args.output.suffix != suffix:
        raise ValueError(f"--output must end with {suffix}, got {args.output}")


def _check_output(args: argparse.Namespace, suffix: str) -> None:
    _check_suffix(args, suffix)
    for path in files_of(args.spec.pretrained):
        for output in (args.output, args.output.with_suffix(".safetensors")):
            check_not_read(output, {"--pretrained": path})


def _classes(args: argparse.Namespace) -> tuple[Vocabulary | None, TextEmbeddings | None]:
    from spar_d2.modeling.words import text_embeddings

    if not args.vocabulary:
        return None, None
    check_has_text(args.spec.name)
    return Vocabulary.load(args.vocabulary), text_embeddings(args.spec, args.templates or "imagenet", "", "cpu")


def _write_classes(args: argparse.Namespace, encoder: DenseEncoder, *classes) -> list[Path]:
    from spar_d2.export import write_classes

    return write_classes(args.output, encoder, *classes)


def _report(written: list[Path]) -> None:
    print(printable(f"Written: {', '.join(map(str, written))}"), flush=True)


def check(args: argparse.Namespace, encoder: DenseEncoder) -> int:
    """Print a comparison with PyTorch; returns 1 if a float32 file differs by more than rounding."""
    from spar_d2.export import check_sizes, compare

    return _judge(args, list(compare(args.output, encoder, check_sizes(encoder))))


def _judge(args: argparse.Namespace, found: list[Comparison]) -> int:
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
    worst, same = max(c.difference for c in found), min(c.same for c in found)
    if args.precision != "float32" or (worst <= TOLERANCE and (args.kind != "labels" or same >= SAME)):
        return 0
    allowed = f"at most {TOLERANCE:.0e} of the largest output, and {100 * SAME} % equal labels"
    print(f"The outputs differ by {worst:.1e}, and {100 * same:.2f} % are equal; rounding explains {allowed}.")
    return 1
