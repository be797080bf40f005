"""Model card of a model folder."""

from __future__ import annotations

from spar_d2.encoders import DenseEncoder, EncoderSpec
from spar_d2.encoders.origin import Origin
from spar_d2.encoders.registry import find_family
from spar_d2.utils.tables import format_table

CARD = "README.md"
_PAPER = "https://arxiv.org/abs/2604.02252"


def model_card(encoder: DenseEncoder, spec: EncoderSpec, license: str) -> str:
    """Return a model card in Markdown: origin and training of the weights, and how to load them."""
    origin, family = encoder.origin or Origin(), find_family(spec.name)
    student = origin.window is not None or bool(origin.teacher)
    rows = [
        ["encoder", origin.encoder or spec.name],
        ["base weights", origin.pretrained or "unknown"],
        ["license of the base weights", license or "see the publisher of the base weights"],
        ["patch size, features", f"{encoder.patch_size} pixels, {encoder.embed_dim} channels"],
        ["pre-training image size", f"{encoder.native_size} pixels"],
        ["pixel mean, standard deviation", f"{_numbers(encoder.pixel_mean)}, {_numbers(encoder.pixel_std)}"],
    ]
    if student:
        rows += [
            ["teacher", origin.teacher or "sliding window"],
            ["window, stride of the teacher", _known(origin.window, origin.stride, unit=" pixels")],
            ["training images, steps", _known(origin.images, origin.steps)],
        ]
    about = (
        f"A SPAR student ({_PAPER}): it computes the features of a slower teacher in a single pass, at any resolution."
        if student
        else "A vision transformer with dense features for images of any size."
    )
    code = ["import spar_d2", "from spar_d2.encoders import build_encoder", "", 'encoder = build_encoder("FOLDER")']
    if family.has_text:
        code.append('result = spar_d2.segment("photo.jpg", "cat, kitten; dog; sky", "FOLDER", "")')
    if family.file_format == "open_clip":
        code += ["", "import open_clip", "", 'model = open_clip.create_model("local-dir:FOLDER")']
    if family.file_format == "timm":
        code += ["", "import timm", "", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)']
    # Model hubs read this header.
    header = ["---", f"license: {license or 'other'}", "tags: [image-segmentation, spar]", "---", ""]
    table = format_table(["property", "value"], rows, left=2)
    heading = ["# " + (origin.encoder or spec.name) + (", SPAR student" if student else ""), "", about, ""]
    return "\n".join([*header, *heading, table, "", "```python", *code, "```", ""])


def _known(*values: int | None, unit: str = "") -> str:
    return ", ".join("unknown" if value is None else f"{value:,}{unit}" for value in values)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
