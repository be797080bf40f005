"""LazyConfig version of coco_mask_transformer_12ep.yaml: the same model, data and schedule."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.data.mappers import PanopticMapper
from spar_d2.encoders import EncoderSpec
from spar_d2.engine.solver import optimizer_params
from spar_d2.evaluation import PanopticEvaluator
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.mask_transformer import Criterion, MaskTransformer, MaskTransformerHead
from spar_d2.modeling.mask_transformer.classifiers import LearnedClassifier

constants = model_zoo.get_config("common/data/constants.py").constants

model = L(MaskTransformer)(
    backbone=L(SPARViT)(
        encoder=L(EncoderSpec)(name="ViT-B-16", pretrained="laion2b_s34b_b88k"),
        pixel_mean="${model.pixel_mean}",
        pixel_std="${model.pixel_std}",
        input_format="${dataloader.train.mapper.image_format}",
        trainable="none",
        precision="bfloat16",
    ),
    head=L(MaskTransformerHead)(
        # Intermediate features of three blocks (``laterals``), and the dense features.
        widths=[768, 768, 768, 512],
        patch_size=16,
        queries=200,
        center_share=0.5,
        width=256,
        blocks=4,
        heads=8,
    ),
    classifier=L(LearnedClassifier)(width=256, classes=133),
    criterion=L(Criterion)(),
    things=80,
    stuff=53,
    laterals=(2, 5, 8),
    pixel_mean=constants.imagenet_bgr256_mean,
    pixel_std=constants.imagenet_bgr256_std,
    max_iter="${train.max_iter}",
)

dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
dataloader.train.dataset.names = "spar_coco_panoptic_train"
dataloader.train.mapper = L(PanopticMapper)(
    is_train=True,
    augmentations=[
        L(T.RandomCrop)(crop_type="absolute", crop_size=(384, 384)),
        L(T.ResizeShortestEdge)(short_edge_length=(640,), sample_style="choice", max_size=1333),
        L(T.RandomFlip)(horizontal=True),
    ],
    image_format="BGR",
)
dataloader.train.num_workers = 8
dataloader.test.dataset.names = "spar_coco_panoptic_val"
dataloader.evaluator = L(PanopticEvaluator)(dataset_name="${dataloader.test.dataset.names}")

optimizer = L(torch.optim.AdamW)(
    # Set by the training tool.
    params=L(optimizer_params)(base_lr="${optimizer.lr}", weight_decay="${optimizer.weight_decay}"),
    lr=1e-4,
    weight_decay=0.05,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=1500 / 90000,
    warmup_factor=0.001,
)

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.max_iter = 90000
train.output_dir = "output/coco_mask_transformer_12ep"
