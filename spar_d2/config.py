"""Defaults and documentation of all config keys of the project."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_spar_config(cfg: CfgNode) -> None:
    """Add the keys ``MODEL.SPAR.*`` and ``SPAR.*`` with their defaults to a Detectron2 config, in place.

    ``import spar_d2`` calls this function on Detectron2's default config, so ``get_cfg()`` returns configs with these
    keys. The function does nothing if the config already has them.
    """
    from detectron2.config import CfgNode as CN

    if "SPAR" in cfg.MODEL:
        return

    cfg.MODEL.SPAR = CN()
    # Name of the image encoder: an open_clip model with a ViT ("ViT-B-16", "ViT-B-16-SigLIP2-512", "PE-Core-B-16"), an
    # open_clip-style JSON model config file, a ViT of timm ("vit_base_patch14_dinov2", "vit_base_patch16_dinov3"), or
    # DINOv3.txt ("dinov3_vitl16_dinotxt_tet1280d20h24l").
    cfg.MODEL.SPAR.ENCODER = "ViT-B-16"
    # Weights of the encoder: a pretrained tag of its library ("laion2b_s34b_b88k"), a weight file, or "" for random
    # weights (always with the same seed).
    cfg.MODEL.SPAR.PRETRAINED = ""
    # Which weights to load from a file that holds several sets, by their key in the file ("ema", "teacher"); "" if the
    # file holds one set.
    cfg.MODEL.SPAR.PRETRAINED_PART = ""
    # Pixel mean and standard deviation (RGB, pixels in 0..1, for example "[0.5, 0.5, 0.5]") that the weights were
    # trained with, and whether their activation is QuickGELU (open_clip ViTs only). None reads the values from the
    # weight file if it has them, and otherwise uses the defaults of the tag, JSON config or model. Do not confuse these
    # with MODEL.PIXEL_MEAN and PIXEL_STD: the framework normalizes with those, and the backbone undoes it.
    cfg.MODEL.SPAR.PIXEL_MEAN = None
    cfg.MODEL.SPAR.PIXEL_STD = None
    cfg.MODEL.SPAR.QUICK_GELU = None
    # For DINOv3.txt: folder of a clone of the dinov3 repository. Code from this folder is executed.
    cfg.MODEL.SPAR.DINOV3_REPO = ""
    # For DINOv3.txt: backbone weights, needed if PRETRAINED holds only the vision head and the text encoder.
    cfg.MODEL.SPAR.DINOV3_BACKBONE = ""
    # For DINOv3.txt: use the patch tokens of the "backbone", as the SPAR authors do, or those of the vision "head".
    cfg.MODEL.SPAR.DINOV3_TOKENS = "backbone"
    # Read-out of the last block. "" is the default of the encoder: the value path for OpenCLIP's ViTs, the patch tokens
    # for others. "self_correlation": patches attend to patches with similar attention outputs (not for DINOv3.txt). For
    # timm's ViTs (DINOv2, DINOv3, ...), also "tokens" for the patch tokens after the final norm (default), or "value"
    # to reduce the attention to the value path.
    cfg.MODEL.SPAR.READOUT = ""
    # Reproduce the reference code of the SPAR authors at image sizes that are not a multiple of the patch size (crop,
    # resize or pad, depending on the encoder family). OpenCLIP position embeddings are then not resampled if the patch
    # grid has the pre-training number of patches in another shape.
    cfg.MODEL.SPAR.REFERENCE_COMPAT = False
    # Precision of matrix products in student and teacher: "float32", "bfloat16", "float16", or "auto" (bfloat16 on GPUs
    # that support it, float32 elsewhere). With SOLVER.AMP.ENABLED, it is the autocast precision of the whole model in
    # training; "float32" then means Detectron2's default, float16.
    cfg.MODEL.SPAR.PRECISION = "float32"
    # Compile the ViT blocks with torch.compile. Compilation takes about a minute at startup.
    cfg.MODEL.SPAR.COMPILE = False
    # Activation checkpointing in training: recompute activations in the backward pass to save memory.
    cfg.MODEL.SPAR.CHECKPOINTING = False
    # Trainable parameters of the encoder: "all", "none", or a comma-separated list of "last_blocks:N", "blk_I" (block
    # I; negative indices count from the last block), "qkv_I", "mlp_I" (layers of block I), "posembed", "patchembed" and
    # "attn_pool_kv" (SigLIP, PE-Core).
    cfg.MODEL.SPAR.TRAINABLE = "last_blocks:2"
    # Convert the framework's normalized input (PIXEL_MEAN, PIXEL_STD, INPUT.FORMAT) to RGB with the encoder's mean and
    # standard deviation. Set it to False only if those keys already hold the encoder's values.
    cfg.MODEL.SPAR.CONVERT_PIXELS = True
    # Output features of the backbone. SPARPyramid: any of "p2" to "p7" and "res2" to "res5" (strides 4 to 128), "dense"
    # (the ViT feature map) and "clip_vis_dense" (FC-CLIP's name for it); () means "p2" to "p6". SPARViT: "dense" and
    # "clip_vis_dense"; () means "dense".
    cfg.MODEL.SPAR.OUT_FEATURES = ()
    # Channels of the SPARPyramid levels: one number for all levels (256 or [256]), or a list with one number for each
    # level of OUT_FEATURES (MaskDINO needs channels that grow with the stride). None means 256.
    cfg.MODEL.SPAR.OUT_CHANNELS = None

    # Classes to segment: a built-in vocabulary ("voc21", "ade20k", ...), a UTF-8 file with one class per line and
    # synonyms separated by ", ", or inline text ("cat, kitten; dog"). "" uses the classes of the test data set.
    cfg.MODEL.SPAR.VOCABULARY = ""
    # Prompt templates: "imagenet" (the 80 templates of open_clip), "simple" ("a photo of a {}."), or a file with one
    # template per line.
    cfg.MODEL.SPAR.TEMPLATES = "imagenet"
    # Cache folder for text embeddings, keyed by model, weights, templates and class names. "auto" is the subfolder
    # "text" of $SPAR_CACHE (default: ~/.cache/spar_d2); "" caches in memory only.
    cfg.MODEL.SPAR.TEXT_CACHE = "auto"
    # Scale of the cosine similarities before the softmax over all class names and synonyms.
    cfg.MODEL.SPAR.LOGIT_SCALE = 40.0
    # Pixels whose highest class probability is below this threshold are assigned to class 0.
    cfg.MODEL.SPAR.PROB_THRESHOLD = 0.0
    # Classes other than 0 are removed if they cover at most this fraction of all pixels not in class 0; 0 keeps all.
    cfg.MODEL.SPAR.AREA_THRESHOLD = 0.0
    # Output of inference: "labels" (H, W) under the key "sem_seg_labels", "scores" (classes, H, W) under Detectron2's
    # key "sem_seg", or "features" (D, h, w) under the key "features". "features" needs no vocabulary; the evaluator
    # compares them with the features of a teacher built from PRETRAINED, so the student to evaluate belongs in
    # MODEL.WEIGHTS.
    cfg.MODEL.SPAR.OUTPUT = "labels"
    # Inference mode: "single_pass"; "sliding_window", with the window and stride of SPAR.TEACHER; or "teacher", the
    # teacher of SPAR.TEACHER with the weights PRETRAINED, even if MODEL.WEIGHTS is set.
    cfg.MODEL.SPAR.INFERENCE = "single_pass"
    # Refinement of the class scores (docs/refinement.md): "" for none, or a comma-separated list, in this order, of
    # "lposs" (label propagation over patches), "anyup" (learned upsampling instead of bilinear) and "lposs+" (label
    # propagation over pixels; slow on a CPU). With test-time augmentation or REFERENCE_COMPAT, only "lposs".
    cfg.MODEL.SPAR.REFINE = ""
    # "anyup": weights of AnyUp (anyup_multi_backbone.pth).
    cfg.MODEL.SPAR.ANYUP = ""
    # "lposs": number of neighbors of a patch.
    cfg.MODEL.SPAR.REFINE_NEIGHBOURS = 400
    # "lposs": encoder, weights and read-out (as ENCODER, PRETRAINED and READOUT) of the features that tell which
    # patches are alike. "" uses the dense features themselves.
    cfg.MODEL.SPAR.REFINE_ENCODER = ""
    cfg.MODEL.SPAR.REFINE_PRETRAINED = ""
    cfg.MODEL.SPAR.REFINE_READOUT = ""

    # MaskTransformer (MODEL.META_ARCHITECTURE): queries with masks and classes, on the features of SPARViT. Numbers of
    # classes are those of PanopticFPN: MODEL.ROI_HEADS.NUM_CLASSES things, and MODEL.SEM_SEG_HEAD.NUM_CLASSES stuff
    # classes, plus one in panoptic segmentation.
    cfg.MODEL.MASK_TRANSFORMER = CN()
    # "panoptic", or "semantic" for label maps, whose classes are all stuff.
    cfg.MODEL.MASK_TRANSFORMER.TASK = "panoptic"
    # Number of queries, an upper limit of the number of segments.
    cfg.MODEL.MASK_TRANSFORMER.QUERIES = 200
    # Share of the queries that start from the patches in which centers of things are found; the others are learned.
    # Without things, all of them are learned.
    cfg.MODEL.MASK_TRANSFORMER.CENTER_SHARE = 0.5
    # Number of queries from centers in inference, for images with more things than those of the training; 0 is that of
    # the training.
    cfg.MODEL.MASK_TRANSFORMER.TEST_CENTERS = 0
    # Channels of queries and patches in the head, its number of blocks, and their attention heads.
    cfg.MODEL.MASK_TRANSFORMER.WIDTH = 256
    cfg.MODEL.MASK_TRANSFORMER.BLOCKS = 4
    cfg.MODEL.MASK_TRANSFORMER.HEADS = 8
    # Blocks of the encoder whose outputs are added to the patches before the first blocks of the head, one for each; ()
    # spreads up to three evenly. The dense features are always used.
    cfg.MODEL.MASK_TRANSFORMER.LATERAL_BLOCKS = ()
    # Number of the encoder's own last blocks that the queries pass, instead of blocks of the head (as in EoMT); 0 uses
    # blocks of the head. Train these blocks (MODEL.SPAR.TRAINABLE last_blocks:N). BLOCKS, HEADS, LATERAL_BLOCKS,
    # CENTER_SHARE and MASKED_ATTENTION then have no effect, and with CLASSIFIER "text", the image is encoded twice.
    cfg.MODEL.MASK_TRANSFORMER.ENCODER_BLOCKS = 0
    # Share of the training in which queries attend only to the patches of their masks; it ends block by block, so that
    # inference needs no masks. 0 disables it.
    cfg.MODEL.MASK_TRANSFORMER.MASKED_ATTENTION = 0.8
    # Weights of the losses, also in the matching of queries and segments, and weight of queries without a segment.
    cfg.MODEL.MASK_TRANSFORMER.CLASS_WEIGHT = 2.0
    cfg.MODEL.MASK_TRANSFORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK_TRANSFORMER.DICE_WEIGHT = 5.0
    cfg.MODEL.MASK_TRANSFORMER.NO_OBJECT_WEIGHT = 0.1
    # Weight of the loss of the heat map in which centers of things are found.
    cfg.MODEL.MASK_TRANSFORMER.CENTER_WEIGHT = 1.0
    # Number of points at which a mask is compared with its segment.
    cfg.MODEL.MASK_TRANSFORMER.POINTS = 12544
    # Outputs: any of "panoptic_seg", "sem_seg" and "instances". () is "panoptic_seg", or "sem_seg" for the semantic
    # task, where MODEL.SPAR.OUTPUT "labels" gives label maps, and "scores" gives scores of all classes.
    cfg.MODEL.MASK_TRANSFORMER.OUTPUTS = ()
    # Panoptic output: queries with a smaller class probability are ignored, and those that keep less than this share of
    # their mask.
    cfg.MODEL.MASK_TRANSFORMER.OBJECT_THRESHOLD = 0.8
    cfg.MODEL.MASK_TRANSFORMER.OVERLAP_THRESHOLD = 0.8
    # Queries are also ignored if the IoU of their mask with that of a query with a larger class probability is above
    # this value; 1 disables it.
    cfg.MODEL.MASK_TRANSFORMER.DUPLICATE_THRESHOLD = 0.7
    # "learned" for a linear layer, or "text" to compare queries and the features inside of their masks with text
    # embeddings. The classes of inference are then MODEL.SPAR.VOCABULARY, by default those of the test data set.
    cfg.MODEL.MASK_TRANSFORMER.CLASSIFIER = "learned"
    # "text": weight of the features inside of a mask, relative to the query, for classes of the training data and for
    # others.
    cfg.MODEL.MASK_TRANSFORMER.SEEN_WEIGHT = 0.4
    cfg.MODEL.MASK_TRANSFORMER.UNSEEN_WEIGHT = 0.8
    # "text": names of training classes that are treated as unlabeled, to evaluate them as unseen ones.
    cfg.MODEL.MASK_TRANSFORMER.UNSEEN = ()

    cfg.SPAR = CN()
    cfg.SPAR.TEACHER = CN()
    # Teacher: "sliding" (sliding window), "self_correlation" (the same with this read-out, see MODEL.SPAR.READOUT),
    # "ensemble" (mean of the teachers in ENSEMBLE), "smoothed" or "upsampled" (refined targets of the teacher in BASE),
    # or a function that a module of --import registers with spar_d2.teacher.TEACHER_REGISTRY.
    cfg.SPAR.TEACHER.KIND = "sliding"
    # Encode each image in a single pass instead of in windows ("sliding" and "self_correlation").
    cfg.SPAR.TEACHER.SINGLE_PASS = False
    # Members of an "ensemble": a kind, "stride:48" (another stride), "scale:1.5" (images are enlarged), "mirror"
    # (mirror images) and "single_pass", or several of these joined by "+", the kind first
    # ("self_correlation+scale:1.5"). The kind is "sliding" if it is not given.
    cfg.SPAR.TEACHER.ENSEMBLE = ("sliding", "mirror")
    # Kind of the teacher whose targets are "smoothed" or "upsampled".
    cfg.SPAR.TEACHER.BASE = "sliding"
    # "smoothed": number of neighbors of a patch in the graph along which features are propagated.
    cfg.SPAR.TEACHER.NEIGHBOURS = 400
    # "upsampled": weights of AnyUp (anyup_multi_backbone.pth), and features along each side of a patch, which are then
    # averaged.
    cfg.SPAR.TEACHER.ANYUP = ""
    cfg.SPAR.TEACHER.UPSAMPLING = 4
    # Projection of the targets to the features of the student: "" for none, or "least_squares" for an affine map that
    # is fitted to the features of the student before training. It is required if the numbers of channels differ.
    cfg.SPAR.TEACHER.PROJECTION = ""
    # Number of images that the projection is fitted on. They are the first of the training, in which the loss is 0.
    cfg.SPAR.TEACHER.PROJECTION_IMAGES = 32
    # Side of the sliding window in pixels, a multiple of the patch size; 0 means the pre-training image size of the
    # encoder.
    cfg.SPAR.TEACHER.WINDOW = 0
    # Stride of the sliding window in pixels. A stride that is not a multiple of the patch size shifts the patch grid
    # from window to window.
    cfg.SPAR.TEACHER.STRIDE = 24
    # Number of windows per forward pass, over all images of a step. It bounds the memory of the teacher, regardless of
    # the image size. 0 chooses it by device and tokens per window; on a GPU, 32,768 tokens (166 windows of 224 pixels).
    cfg.SPAR.TEACHER.BATCH_SIZE = 0
    # Precision of matrix products in the teacher, as in MODEL.SPAR.PRECISION; "" uses the precision of the student.
    cfg.SPAR.TEACHER.PRECISION = ""
    # Number of randomly sampled windows per training image (of each member of an ensemble); 0 encodes all windows.
    cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 0
    # Cache folder for teacher targets, so that each image is encoded only once; "" disables the cache. It requires
    # SPAR.DATA.FROZEN, because cached targets are valid only for identical pixels. With WINDOWS_PER_IMAGE, the cache is
    # read but not filled.
    cfg.SPAR.TEACHER.CACHE_DIR = ""

    cfg.SPAR.DISTILL = CN()
    # Train by distillation: the trainer adds the distillation hook, and "loss_distill" to the losses of the model.
    cfg.SPAR.DISTILL.ENABLED = False
    # Weight of "loss_distill"; must be positive.
    cfg.SPAR.DISTILL.WEIGHT = 1.0
    # Averaging of the loss over the feature grid: "image" averages within each image first, so that all images of a
    # step have the same weight; "cell" averages over all grid cells of the step, so that larger images have more
    # weight.
    cfg.SPAR.DISTILL.AVERAGE = "image"
    # Memory in GiB for the outputs of the frozen blocks at the start of the encoder, which are then computed only once
    # per image. Useful for a few hundred images with SPAR.DATA.FROZEN; 0 computes them in every step.
    cfg.SPAR.DISTILL.FROZEN_OUTPUTS_GIB = 0.0

    cfg.SPAR.DATA = CN()
    # Data-set files (docs/own_data.md) to register, relative to the current folder, or to the folder of the config or
    # its parents. Each split of a file "my_set.yaml" becomes a data set "my_set_SPLIT" for DATASETS.TRAIN and
    # DATASETS.TEST. The number of classes of the model's heads is taken from the file, unless the config sets it.
    cfg.SPAR.DATA.REGISTER = ()
    # Number of epochs of a training. SOLVER.MAX_ITER is then computed from the number of images and
    # SOLVER.IMS_PER_BATCH, and SOLVER.STEPS and SOLVER.WARMUP_ITERS are scaled with it. 0 uses SOLVER.MAX_ITER. If a
    # config and its bases set both EPOCHS and MAX_ITER, the command line precedes the config, and the config its bases.
    cfg.SPAR.DATA.EPOCHS = 0
    # Images to distill on: a folder (searched recursively, including tar files), a tar file, or a list (*.txt with one
    # image, folder or tar file per line). Join several sources with colons ("a:b"). "" uses DATASETS.TRAIN.
    cfg.SPAR.DATA.IMAGES = ""
    # Corrupt images are skipped and logged; training stops after more than this number of them.
    cfg.SPAR.DATA.MAX_DAMAGED = 100
    # Apply the same augmentation to an image in every epoch, regardless of SEED.
    cfg.SPAR.DATA.FROZEN = False
    # Training images are resized, keeping the aspect ratio, to fit into this box (long side, short side; in pixels) ...
    cfg.SPAR.DATA.SCALE_BOX = (2048, 1024)
    # ... multiplied by a random factor from this range.
    cfg.SPAR.DATA.SCALE_RANGE = (0.5, 1.0)
    # If the short side is then smaller than this, the image is enlarged to it and not cropped.
    cfg.SPAR.DATA.MIN_SHORT_SIDE = 512
    # Probability of a random crop of the resized image.
    cfg.SPAR.DATA.CROP_PROB = 0.5
    # Each side of a crop is sampled between max(CROP_MIN_FRACTION * side, CROP_MIN_SIDE pixels) and the full side.
    cfg.SPAR.DATA.CROP_MIN_FRACTION = 0.4
    cfg.SPAR.DATA.CROP_MIN_SIDE = 512
    # Sides of training images are cropped to a multiple of this, in pixels: the patch size or a multiple of it.
    cfg.SPAR.DATA.SIDE_MULTIPLE = 16
    # Probability of a horizontal flip.
    cfg.SPAR.DATA.FLIP_PROB = 0.5

    # Use TF32 for float32 matrix products on GPUs: several times faster, with a 10-bit instead of a 23-bit mantissa.
    # Target stitching and label prediction always use full float32.
    cfg.SPAR.TF32 = True
    # Name of the optimizer class in torch.optim ("AdamW", "Adam", "SGD", ...).
    cfg.SPAR.OPTIMIZER = "AdamW"
    # Layer-wise learning rate decay of the encoder: the learning rate is multiplied by this factor once more for each
    # block from the last to the first (for example 0.8); 1 disables it. Other parameters use the full learning rate.
    cfg.SPAR.LAYER_DECAY = 1.0
    # Gradient accumulation: split each batch (SOLVER.IMS_PER_BATCH) into this many parts. The result is the same, with
    # less memory.
    cfg.SPAR.ACCUMULATION_STEPS = 1
    # Decay of the exponential moving average (EMA) of the student's weights (for example 0.999); 0 disables it. With
    # EMA, the averaged weights are evaluated, exported as the student, and loaded from checkpoints, except with
    # --resume.
    cfg.SPAR.EMA_DECAY = 0.0
    # Number of most recent checkpoints to keep; 0 keeps all.
    cfg.SPAR.KEEP_CHECKPOINTS = 0
    # Number of iterations between visualizations of an image with its teacher and student features; 0 disables them.
    cfg.SPAR.PICTURE_PERIOD = 0

    cfg.SPAR.TEST = CN()
    # Test settings on the benchmarks of the paper (voc21, voc20, cityscapes, ade20k, context60, context59): "paper"
    # uses the paper's image size, logit scale and thresholds instead of INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST,
    # MODEL.SPAR.LOGIT_SCALE, PROB_THRESHOLD and AREA_THRESHOLD; "config" uses these keys.
    cfg.SPAR.TEST.PROTOCOL = "paper"
    # Also compute the boundary IoU of each class, as Detectron2's SemSegEvaluator does; evaluation takes several times
    # as long.
    cfg.SPAR.TEST.BOUNDARY_IOU = False
    # Write the predicted masks to OUTPUT_DIR/inference, as Detectron2's SemSegEvaluator does.
    cfg.SPAR.TEST.DUMP_PREDICTIONS = False

    cfg.SPAR.PROBE = CN()
    # Cache folder for the features of training images in linear probing (ProbeSegmentor), so that each image is encoded
    # only once. It requires a frozen encoder and fixed pixels (one size, no crop, no flip). "auto" is "features" in
    # OUTPUT_DIR if these conditions hold, and no cache otherwise; "" disables the cache.
    cfg.SPAR.PROBE.CACHE_DIR = "auto"
