"""Every config key of the project, each documented once, here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_spar_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SPAR.*`` and ``SPAR.*`` with their defaults to a Detectron2 config, in place.

    ``import spar_d2`` does this for Detectron2's default config, so every ``get_cfg()`` has the keys. Calling it again
    on a config that has them changes nothing.
    """
    from detectron2.config import CfgNode as CN

    if "SPAR" in cfg.MODEL:
        return

    cfg.MODEL.SPAR = CN()
    # Image encoder, a model name: a ViT or SigLIP model of open_clip ("ViT-B-16", "ViT-B-16-SigLIP2-512") or a JSON
    # model config file of open_clip's form, a DINOv3 ViT of timm ("vit_base_patch16_dinov3"), or DINOv3.txt
    # ("dinov3_vitl16_dinotxt_tet1280d20h24l").
    cfg.MODEL.SPAR.ENCODER = "ViT-B-16"
    # Its weights: a tag of its library's ("laion2b_s34b_b88k"), a file, or "" for random ones (the same every time).
    cfg.MODEL.SPAR.PRETRAINED = ""
    # Which weights to take of a file with several, by their name in it ("ema", "teacher"); "" takes the only ones.
    cfg.MODEL.SPAR.PRETRAINED_PART = ""
    # Mean and deviation of pixels in 0..1 (red, green, blue) that the weights were trained with, "[0.5, 0.5, 0.5]", and
    # whether their activation is QuickGELU (open_clip's ViTs alone). None is what the weight file says of itself, or
    # else what the tag, the JSON config or the model's name does. Not to be mixed up with MODEL.PIXEL_MEAN and
    # PIXEL_STD, which are what the framework normalizes with, and are undone.
    cfg.MODEL.SPAR.PIXEL_MEAN = None
    cfg.MODEL.SPAR.PIXEL_STD = None
    cfg.MODEL.SPAR.QUICK_GELU = None
    # For DINOv3.txt: folder with a clone of the dinov3 repository. Code in it is run.
    cfg.MODEL.SPAR.DINOV3_REPO = ""
    # For DINOv3.txt: weights of the backbone, where PRETRAINED has only the vision head and the text encoder.
    cfg.MODEL.SPAR.DINOV3_BACKBONE = ""
    # For DINOv3.txt: patch tokens of the "backbone", as the authors of SPAR take them, or of the vision "head" on it.
    cfg.MODEL.SPAR.DINOV3_TOKENS = "backbone"
    # Reproduce the authors' code at sizes that are no multiple of the patch (cut, stretch or pad as it does for the
    # family), and add OpenCLIP's position table unresampled where a grid has the native number of cells but another
    # shape.
    cfg.MODEL.SPAR.REFERENCE_COMPAT = False
    # Precision of matrix products in student and teacher: "float32", "bfloat16", "float16", or "auto", which is
    # bfloat16 on a GPU that computes in it and float32 elsewhere. With SOLVER.AMP.ENABLED in training it is that of the
    # whole model, where "float32" stands for Detectron2's float16.
    cfg.MODEL.SPAR.PRECISION = "float32"
    # Compile the blocks of the ViT with torch.compile; takes a minute at the start.
    cfg.MODEL.SPAR.COMPILE = False
    # In training, keep only the inputs of blocks and compute the rest twice: less memory, more time.
    cfg.MODEL.SPAR.CHECKPOINTING = False
    # What is trained: "all", "none", or words joined by commas, of "last_blocks:N", "blk_I" (block I; negative: from
    # the end), "qkv_I", "mlp_I" (parts of it), "posembed", "patchembed", "attn_pool_kv" (SigLIP).
    cfg.MODEL.SPAR.TRAINABLE = "last_blocks:2"
    # Bring the framework's normalized input (PIXEL_MEAN, PIXEL_STD, INPUT.FORMAT) to the encoder's own mean and
    # deviation in RGB. Set it to False only where those keys already are the encoder's.
    cfg.MODEL.SPAR.CONVERT_PIXELS = True
    # What the backbone returns. SPARPyramid: any of "p2" to "p7" and "res2" to "res5" (strides 4 to 128), "dense" (the
    # plain map) and "clip_vis_dense" (FC-CLIP's name for it); () is "p2" to "p6". SPARViT: the last two; () is "dense".
    cfg.MODEL.SPAR.OUT_FEATURES = ()
    # Channels of the levels of SPARPyramid: one number for all (256 or [256]), or a list with one for each level of
    # OUT_FEATURES (MaskDINO wants them to grow with the stride); None is 256.
    cfg.MODEL.SPAR.OUT_CHANNELS = None

    # Classes to segment: a built-in vocabulary ("voc21", "ade20k", ...), a file in UTF-8 with one class per line and
    # synonyms separated by ", ", or inline text ("cat, kitten; dog"). "" takes those of the data set under test.
    cfg.MODEL.SPAR.VOCABULARY = ""
    # Prompt templates: "imagenet" (open_clip's 80), "simple" ("a photo of a {}."), or a file with one per line.
    cfg.MODEL.SPAR.TEMPLATES = "imagenet"
    # Folder that keeps text embeddings between runs, by model, weights, templates and words; "auto" is "text" in the
    # folder that the environment variable SPAR_CACHE names, or else in ~/.cache/spar_d2; "" keeps them in memory only.
    cfg.MODEL.SPAR.TEXT_CACHE = "auto"
    # Factor on the cosine scores before the softmax over all words.
    cfg.MODEL.SPAR.LOGIT_SCALE = 40.0
    # Pixels whose best class has a lower probability than this become class 0.
    cfg.MODEL.SPAR.PROB_THRESHOLD = 0.0
    # Classes other than 0 that cover no more than this share of the pixels of all such classes are removed; 0: none.
    cfg.MODEL.SPAR.AREA_THRESHOLD = 0.0
    # Inference returns "labels" (H, W) in "sem_seg_labels", "scores" (classes, H, W) in Detectron2's "sem_seg", or
    # "features" (D, h, w) in "features", which needs no classes; they are evaluated by their distance to those of the
    # teacher, which is made of PRETRAINED: a student to evaluate goes into MODEL.WEIGHTS.
    cfg.MODEL.SPAR.OUTPUT = "labels"
    # How inference encodes the image: "single_pass", or "sliding_window" with SPAR.TEACHER's window and stride.
    cfg.MODEL.SPAR.INFERENCE = "single_pass"

    cfg.SPAR = CN()
    cfg.SPAR.TEACHER = CN()
    # Side of the sliding window in pixels, a multiple of the patch; 0 is the encoder's pre-training size.
    cfg.SPAR.TEACHER.WINDOW = 0
    # Step of the sliding window in pixels. One that the patch does not divide cuts every pixel differently.
    cfg.SPAR.TEACHER.STRIDE = 24
    # Windows encoded at once, of all images of a step; the teacher's memory grows with it, not with the image. 0
    # chooses by the device and the tokens of a window: on a GPU 32,768 tokens, which are 166 windows of 224 pixels.
    cfg.SPAR.TEACHER.BATCH_SIZE = 0
    # Precision of the teacher's matrix products, as MODEL.SPAR.PRECISION; "" is the student's.
    cfg.SPAR.TEACHER.PRECISION = ""
    # Windows drawn at random per training image; 0 encodes them all.
    cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 0
    # Folder that keeps the targets of all windows, so that each image is encoded once; "" keeps none. It pays only
    # where images come back with the same pixels, so it needs SPAR.DATA.FROZEN. With WINDOWS_PER_IMAGE it is read, but
    # not filled.
    cfg.SPAR.TEACHER.CACHE_DIR = ""

    cfg.SPAR.DISTILL = CN()
    # Train by distillation: the trainer adds the hook, "loss_distill" joins the model's losses.
    cfg.SPAR.DISTILL.ENABLED = False
    # Factor on "loss_distill", above 0.
    cfg.SPAR.DISTILL.WEIGHT = 1.0
    # The loss is the mean over cells: of each image by itself, so that all images of a step count the same ("image"),
    # or of all images of a step together, so that large ones count for more ("cell").
    cfg.SPAR.DISTILL.AVERAGE = "image"

    cfg.SPAR.DATA = CN()
    # Photos to distill on: a folder (with its sub-folders, and the tar files in them), a tar file, or a list (*.txt,
    # one photo, folder or tar file per line); several are joined as in PATH ("a:b"). "" uses DATASETS.TRAIN.
    cfg.SPAR.DATA.IMAGES = ""
    # Damaged photos are skipped and named in the log; more than this many stop the run.
    cfg.SPAR.DATA.MAX_DAMAGED = 100
    # Augment a photo the same way every time, with any SEED, instead of anew in every epoch.
    cfg.SPAR.DATA.FROZEN = False
    # A training image is scaled, keeping its proportions, to fit into this box of (long side, short side) in pixels ...
    cfg.SPAR.DATA.SCALE_BOX = (2048, 1024)
    # ... times a random factor from this range,
    cfg.SPAR.DATA.SCALE_RANGE = (0.5, 1.0)
    # but if its short side is then below this, it is enlarged to it, and not cropped.
    cfg.SPAR.DATA.MIN_SHORT_SIDE = 512
    # Chance of training on a random crop of the scaled image.
    cfg.SPAR.DATA.CROP_PROB = 0.5
    # A crop's sides are drawn between max(CROP_MIN_FRACTION of the side, CROP_MIN_SIDE pixels) and the whole side.
    cfg.SPAR.DATA.CROP_MIN_FRACTION = 0.4
    cfg.SPAR.DATA.CROP_MIN_SIDE = 512
    # Sides of training images are cut to a multiple of this, in pixels: the encoder's patch, or a multiple of it.
    cfg.SPAR.DATA.SIDE_MULTIPLE = 16
    # Chance of a horizontal flip.
    cfg.SPAR.DATA.FLIP_PROB = 0.5

    # On GPUs, compute float32 matrix products in TF32: several times as fast, with 10 bits of fraction instead of 23.
    # Targets are stitched and labels found in float32 all the same.
    cfg.SPAR.TF32 = True
    # Optimizer for training, by its name in torch.optim ("AdamW", "Adam", "SGD", ...).
    cfg.SPAR.OPTIMIZER = "AdamW"
    # Factor on the learning rate of the encoder's blocks, once more for each block from the last to the first ("0.8");
    # 1 trains all alike. What is not the encoder's has the full rate.
    cfg.SPAR.LAYER_DECAY = 1.0
    # Parts that the images of a step (SOLVER.IMS_PER_BATCH) are taken in, one after another: the same step, less
    # memory.
    cfg.SPAR.ACCUMULATION_STEPS = 1
    # Share of the old value in a moving average of the student's weights ("0.999"), which is then what is evaluated,
    # written as the student, and taken of a checkpoint wherever it is used but to resume its run; 0 keeps none.
    cfg.SPAR.EMA_DECAY = 0.0
    # Checkpoints of a run kept, the latest; 0 keeps all.
    cfg.SPAR.KEEP_CHECKPOINTS = 0
    # Iterations between pictures of an image and of the teacher's and the student's features; 0 makes none.
    cfg.SPAR.PICTURE_PERIOD = 0

    cfg.SPAR.TEST = CN()
    # On the benchmarks of the paper (voc21, voc20, cityscapes, ade20k, context60, context59): "paper" tests at the
    # paper's size and with its logit scale and thresholds, in place of INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST,
    # MODEL.SPAR.LOGIT_SCALE, PROB_THRESHOLD and AREA_THRESHOLD; "config" tests with those keys.
    cfg.SPAR.TEST.PROTOCOL = "paper"
    # Also compute the boundary IoU of every class, as Detectron2's own evaluator; takes several times as long.
    cfg.SPAR.TEST.BOUNDARY_IOU = False
    # Write the predicted masks, as Detectron2's own evaluator does, to OUTPUT_DIR/inference.
    cfg.SPAR.TEST.DUMP_PREDICTIONS = False

    cfg.SPAR.PROBE = CN()
    # Folder that keeps the features of the training images of a linear probe (ProbeSegmentor), so that each image is
    # encoded once: where the encoder is frozen and images come back with the same pixels (one size, no crop, no flip).
    # "auto" is "features" in OUTPUT_DIR where that is so, and none otherwise; "" keeps none.
    cfg.SPAR.PROBE.CACHE_DIR = "auto"
