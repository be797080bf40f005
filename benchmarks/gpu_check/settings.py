"""How much the parts do: on a GPU, or small enough to try them without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

# Of the checkout: its tools and configs are used as a user would.
ROOT = Path(__file__).resolve().parents[2]
# Makes a distillation a tiny one.
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
    """What the parts use; the defaults are those of a GPU.

    Attributes:
        device: what is checked; its results are compared with a CPU's.
        models: built with random weights; beside them every family's tiny example is checked.
        compiled: how many of the models are compiled, and of the examples.
        sizes: (H, W) of the images that features are compared for.
        precisions: beside float32.
        words: numbers of text vectors that pixels are labeled with.
        label_sizes: (H, W) of labels, and what is covered by 16-pixel cells that are padded.
        speed_sizes: sides of square images.
        teacher_sizes: (width, height), and the windows that are encoded: all, or only the first ones.
        label_side: long side of the image whose labels are timed.
        evaluated: images of each size for the evaluator.
        repeats: calls whose median time is taken.
        limit: seconds after which no call is repeated.
        recipes: config files of distillations, relative to ``configs``.
        recipe_overrides: config keys and values in turn.
        images_a_step: for each recipe.
        photos, photo_size: number and (width, height) of the JPEGs that are drawn.
        workers: loading processes.
        steps: of each training.
        demo_overrides: config keys and values in turn.
        demo_scores: mIoU that a row of the demo's table should have, by the number of the row.
        resumed_steps: of the training that is stopped and resumed, after the stop.
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
    demo_overrides: tuple = ()
    demo_scores: tuple[tuple[int, float], ...] = ((0, 21.7), (1, 42.5), (2, 46.6), (3, 57.9))
    resumed_steps: int = 20


def small(device: torch.device) -> Settings:
    """Everything once, as small as it can be."""
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
        demo_overrides=("SOLVER.MAX_ITER", 1, "SPAR.TEACHER.STRIDE", 64, "INPUT.MIN_SIZE_TEST", 64),
        # Those of the rows that do not depend on the training.
        demo_scores=((0, 15.0), (1, 15.6), (2, 15.6)),
        resumed_steps=2,
    )
