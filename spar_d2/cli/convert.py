"""Convert weights between this project, open_clip, timm, the dinov3 repository and the authors of SPAR.

Any of their files is read: safetensors, checkpoints of torch, of Lightning (the authors') and of Detectron2. For
example, a student from a training checkpoint, to a file that open_clip.create_model(NAME, pretrained=FILE) loads:

    python tools/convert_weights.py --encoder ViT-B-16 --text laion2b_s34b_b88k \\
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
    parser.add_argument("--encoder", required=True, help="the model that the weights are of, as MODEL.SPAR.ENCODER")
    parser.add_argument("--input", required=True, help="weight file to convert")
    parser.add_argument("--output", required=True, help="file to write (.safetensors, .pt, .pth)")
    parser.add_argument(
        "--to",
        default="",
        help="open_clip (or dinov3, for DINOv3.txt), timm (image trunk alone), authors (for their code); "
        "default: that of the model's library",
    )
    parser.add_argument(
        "--part",
        default="",
        help="which weights to take of a file with several, by their name in it (ema, teacher, ...)",
    )
    parser.add_argument(
        "--pixel-mean",
        type=float,
        nargs=3,
        metavar="X",
        help="of pixels in 0..1, red, green, blue, that the weights were trained with, where the input does not say it "
        "and it is not the model's usual one; it is written into the output, as are:",
    )
    parser.add_argument("--pixel-std", type=float, nargs=3, metavar="X", help="the deviation, and")
    parser.add_argument(
        "--quick-gelu",
        action=argparse.BooleanOptionalAction,
        help="whether the activation is QuickGELU (open_clip's ViTs)",
    )
    parser.add_argument("--text", default="", help="tag or file with the text tower, where the input has none")
    parser.add_argument("--dinov3-repo", default="", help="clone of the dinov3 repository, for DINOv3.txt")
    parser.add_argument("--dinov3-backbone", default="", help="file with the backbone, where the input has none")
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
        read = {"--input": args.input, "--text": args.text, "--dinov3-backbone": args.dinov3_backbone}
        for flag, path in ((flag, path) for flag, named in read.items() if named for path in files_of(named)):
            check_not_read(args.output, {flag: path})
        tensors = convert_weights(spec, args.to, args.text)

        write_weights(tensors, args.output, known_origin(spec))
    print(f"Wrote {len(tensors)} tensors to {args.output}.")
