"""LazyConfig version of coco_panoptic_fpn_1x.yaml: the same model, data and schedule."""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.data.mappers import PanopticMapper
from spar_d2.encoders import EncoderSpec
from spar_d2.engine.solver import optimizer_params
from spar_d2.evaluation import PanopticEvaluator
from spar_d2.modeling.backbone import SPARViT
from spar_d2.modeling.pyramid import SPARPyramid

model = model_zoo.get_config("common/models/panoptic_fpn.py").model
model.backbone = L(SPARPyramid)(
    net=L(SPARViT)(
        encoder=L(EncoderSpec)(name="ViT-B-16", pretrained="laion2b_s34b_b88k"),
        pixel_mean="${model.pixel_mean}",
        pixel_std="${model.pixel_std}",
        input_format="${model.input_format}",
        trainable="last_blocks:2",
        precision="float32",
    ),
    out_channels=256,
)

dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
dataloader.train.dataset.names = "spar_coco_panoptic_train"
dataloader.train.mapper = L(PanopticMapper)(
    is_train=True,
    augmentations=[
        L(T.ResizeShortestEdge)(short_edge_length=(640, 672, 704, 736, 768, 800), sample_style="choice", max_size=1333),
        L(T.RandomFlip)(horizontal=True),
    ],
    image_format="${model.input_format}",
)
dataloader.test.dataset.names = "spar_coco_panoptic_val"
dataloader.evaluator = L(PanopticEvaluator)(dataset_name="${dataloader.test.dataset.names}")

optimizer = L(torch.optim.AdamW)(
    # Set by the training tool.
    params=L(optimizer_params)(base_lr="${optimizer.lr}", weight_decay="${optimizer.weight_decay}", layer_decay=0.7),
    lr=1e-4,
    weight_decay=0.1,
)
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.output_dir = "output/coco_panoptic_fpn_1x"
