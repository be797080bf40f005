"""Settings of the parts: for a GPU, or minimal ones to test the check without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

# Root of the repository, whose tools and configs are run.
ROOT = Path(__file__).resolve().parents[2]
# Overrides for a minimal distillation.
TINY = (
    "MODEL.SPAR.ENCODER",
    str(ROOT / "configs" / "toy" / "tiny_clip.json"),
    "SPAR.DATA.SCALE_BOX",
    "(192,96)",
    "SPAR.DATA.MIN_SHORT_SIDE",
    64,
    "SPAR.DATA.CROP_MIN_SIDE",
    48,
)


@dataclass(frozen=True)
class Settings:
    """Settings of the parts; the defaults are for a GPU.

    Attributes:
        device: device to check; results are compared with a CPU.
        models: models with random weights. In addition, a tiny example of every family is checked.
        compiled: numbers of models and of tiny examples to check with torch.compile.
        sizes: (H, W) of the images for feature comparisons.
        precisions: precisions in addition to float32.
        words: numbers of text embeddings for labels.
        label_sizes: (H, W) of the labels; the features cover multiples of 16 pixels.
        speed_sizes: sides of square images.
        teacher_sizes: (width, height) of the teacher's images.
        teacher_windows: number of windows to encode; None for all.
        label_side: long side of the image for the timing of labels.
        evaluated: number of images of each size for the evaluator.
        repeats: number of calls for median times.
        limit: number of seconds after which calls are not repeated.
        recipes: config files of distillations, relative to ``configs``.
        recipe_overrides: alternating config keys and values.
        images_a_step: batch sizes for each recipe.
        photos, photo_size: number and (width, height) of synthetic JPEGs.
        workers: number of worker processes.
        steps: number of steps of each training.
        panoptic: name, config file and overrides of panoptic models, MaskTransformer first.
        panoptic_side: side of their square images.
        demo_overrides: alternating config keys and values.
        demo_scores: (row index, expected mIoU) for the demo's table.
        resumed_steps: number of steps after the training was stopped and resumed.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    models: tuple[str, ...] = ("ViT-B-16", "ViT-B-16-SigLIP2-512", "vit_base_patch16_dinov3")
    compiled: tuple[int, int] = (1, 3)
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (333, 250))
    precisions: tuple[str, ...] = ("bfloat16", "float16")
    words: tuple[int, ...] = (20, 150, 1000)
    label_sizes: tuple[tuple[int, int], ...] = ((777, 1033), (517, 389), (33, 1025))
    speed_sizes: tuple[int, ...] = (512, 1024, 2048, 3072)
    teacher_sizes: tuple[tuple[int, int], ...] = ((1024, 1024), (2048, 1024))
    teacher_windows: int | None = 512
    label_side: int = 2048
    evaluated: int = 20
    repeats: int = 5
    limit: float | None = 4.0
    recipes: tuple[str, ...] = (
        "distill/openclip_vit_b_16_sampled.yaml",
        "distill/siglip2_vit_b_16_512_sampled.yaml",
    )
    recipe_overrides: tuple = ()
    images_a_step: tuple[int, ...] = (1, 4)
    photos: int = 16
    photo_size: tuple[int, int] = (2250, 1500)
    workers: int = 8
    steps: int = 40
    panoptic: tuple[tuple[str, str, tuple], ...] = (
        ("MaskTransformer", "panoptic/coco_mask_transformer_12ep.yaml", ()),
        ("PanopticFPN", "panoptic/coco_panoptic_fpn_1x_frozen.yaml", ()),
    )
    panoptic_side: int = 640
    demo_overrides: tuple = ()
    demo_scores: tuple[tuple[int, float], ...] = ((0, 21.7), (1, 42.5), (2, 46.6), (3, 57.9))
    resumed_steps: int = 20


def small(device: torch.device) -> Settings:
    """Return minimal settings."""
    return Settings(
        device=device,
        models=("vit_nano_patch8_dinov3",),
        compiled=(0, 1),
        sizes=((64, 64), (50, 70)),
        precisions=("bfloat16",),
        words=(3, 20),
        label_sizes=((65, 50),),
        speed_sizes=(64,),
        teacher_sizes=((100, 90),),
        teacher_windows=4,
        label_side=100,
        evaluated=1,
        repeats=1,
        recipes=("distill/openclip_vit_b_16_sampled.yaml",),
        recipe_overrides=(*TINY, "MODEL.SPAR.PRECISION", "float32"),
        images_a_step=(1,),
        photos=2,
        photo_size=(120, 80),
        workers=1,
        steps=6,
        panoptic=(
            ("MaskTransformer", "toy/mask_transformer.yaml", ("MODEL.MASK_TRANSFORMER.POINTS", 64)),
            ("PanopticFPN", "toy/panoptic.yaml", ()),
        ),
        panoptic_side=64,
        demo_overrides=("SOLVER.MAX_ITER", 1, "SPAR.TEACHER.STRIDE", 64, "INPUT.MIN_SIZE_TEST", 64),
        # Only rows that do not depend on the training.
        demo_scores=((0, 15.0), (1, 15.6), (2, 15.6)),
        resumed_steps=2,
    )
