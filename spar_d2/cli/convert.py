"""Convert weights between this project, open_clip, timm, the dinov3 repository and the SPAR authors' code.

Supported input files: safetensors and checkpoints of PyTorch, Lightning (used by the SPAR authors) and Detectron2. For
example, convert a training checkpoint to a file that open_clip.create_model(NAME, pretrained=FILE) can load:

    spar-d2 convert --encoder ViT-B-16 --text laion2b_s34b_b88k \\
        --input output/distill/model_final.pth --output student.safetensors
"""

from __future__ import annotations

import argparse
import os

from spar_d2.encoders import EncoderSpec
from spar_d2.encoders.convert import check_suffix, convert_weights, known_origin, write_weights
from spar_d2.encoders.weight_files import files_of
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import check_not_read


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="model of the weights, as in MODEL.SPAR.ENCODER")
    parser.add_argument("--input", required=True, help="weight file to convert")
    parser.add_argument("--output", required=True, help="file to write (.safetensors, .pt, .pth)")
    parser.add_argument(
        "--to",
        default="",
        help="output format: open_clip (dinov3 for DINOv3.txt), timm (image trunk only), or authors (SPAR authors' "
        "code); default: the format of the model's library",
    )
    parser.add_argument(
        "--part",
        default="",
        help="which weights to convert if the input holds several sets, by their key in the file (ema, teacher, ...)",
    )
    parser.add_argument(
        "--pixel-mean",
        type=float,
        nargs=3,
        metavar="X",
        help="pixel mean (RGB, pixels in 0..1) that the weights were trained with; needed only if the input does not "
        "store it and it differs from the model's default. It is stored in the output, like the next two options.",
    )
    parser.add_argument(
        "--pixel-std", type=float, nargs=3, metavar="X", help="pixel standard deviation, see --pixel-mean"
    )
    parser.add_argument(
        "--quick-gelu",
        action=argparse.BooleanOptionalAction,
        help="whether the activation is QuickGELU (open_clip ViTs), see --pixel-mean",
    )
    parser.add_argument("--text", default="", help="tag or file with the text tower, if the input has none")
    parser.add_argument("--dinov3-repo", default="", help="clone of the dinov3 repository, for DINOv3.txt")
    parser.add_argument("--dinov3-backbone", default="", help="file with the backbone, if the input has none")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    spec = EncoderSpec(
        args.encoder,
        args.input,
        dinov3_repo=args.dinov3_repo,
        dinov3_backbone=args.dinov3_backbone,
        pixel_mean=args.pixel_mean,
        pixel_std=args.pixel_std,
        quick_gelu=args.quick_gelu,
        pretrained_part=args.part,
    )
    with readable_errors():
        if not os.path.isfile(args.input):
            raise FileNotFoundError(f"--input: there is no file {args.input!r}")
        check_suffix(args.output, args.to)
        inputs = {"--input": args.input, "--text": args.text, "--dinov3-backbone": args.dinov3_backbone}
        for flag, path in ((flag, path) for flag, name in inputs.items() if name for path in files_of(name)):
            check_not_read(args.output, {flag: path})
        tensors = convert_weights(spec, args.to, args.text)

        write_weights(tensors, args.output, known_origin(spec))
    print(f"Wrote {len(tensors)} tensors to {args.output}.")
