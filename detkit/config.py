"""Every setting of a run, as frozen pydantic models; one complete YAML file a run, readable alone."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic.fields import FieldInfo

from detkit.errors import UserError, nearest
from detkit.geometry import Rule

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Triple = tuple[float, float, float]
Device = Literal["auto", "cpu", "cuda", "mps"]
Activation = Literal["relu", "relu6", "leaky_relu", "elu", "selu", "silu", "gelu", "hardswish", "mish"]
Init = Literal[
    "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "orthogonal", "normal", "trunc_normal"
]


class Settings(BaseModel):
    """A group of settings: immutable, and an unknown key is an error."""

    # Validators are built when they are first used: the runtime needs one of these groups.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Data(Settings):
    """Where the photos and annotations are, and how they are read."""

    root: Path = Field(description="folder of the data set: VOC layout, or images beside their XML")
    train: str = Field("train", description="split to train on: ImageSets/Main/<name>.txt, or 'train' of a hash split")
    val: str = Field("val", description="split to evaluate on")
    val_share: Share = Field(0.2, description="share of photos that the hash split puts into 'val' (no split files)")
    classes: tuple[str, ...] | Path | None = Field(
        None, description="class names, or a file with one a line; default: ROOT/classes.txt, else those in the XML"
    )
    format: Literal["voc", "coco", "yolo", "labelme", "cvat", "openimages", "csv"] = Field(
        "voc", description="what the annotations are written in"
    )
    convention: Literal["auto", "edges", "devkit"] = Field(
        "auto",
        description="boxes in VOC XML: 0-based edges (LabelImg), or 1-based inclusive pixels (VOC devkit); auto: "
        "the files decide, and why is said",
    )
    unlabelled: Literal["error", "skip", "negative"] = Field(
        "error", description="what an image without annotation means"
    )
    cache: Path | None = Field(None, description="folder of the pickle cache; default ROOT/.detkit-cache")


class Tiles(Settings):
    """Parts of photos that are looked at one by one."""

    size: tuple[PositiveInt, PositiveInt] = Field(description="height and width of a tile in pixels of the photo")
    overlap: int = Field(
        ge=0, description="longest side in pixels of objects that are whole in some tile; longer ones: whole photos"
    )


class Input(Settings):
    """The canvas the network sees."""

    size: tuple[PositiveInt, PositiveInt] = Field(description="height and width in pixels")
    resize: Rule = Field("stretch", description="how a photo is fitted to the canvas")
    mean: Triple = Field((0.485, 0.456, 0.406), description="RGB mean, of values in 0..1")
    std: Triple = Field((0.229, 0.224, 0.225), description="RGB standard deviation, of values in 0..1")
    tiles: Tiles | None = Field(
        None, description="train on tiles of photos, for dense shelves in large ones; eval joins what is found in them"
    )


class Augment(Settings):
    """Random changes of the training photos; each number is a probability unless said."""

    flip: Share = Field(0.5, description="mirror left-right")
    crop: Share = Field(0.5, description="SSD's random crop with a minimum IoU to some object")
    expand: Share = Field(0.0, description="SSD's zoom-out: the photo on a larger canvas of the mean colour")
    expand_max: PositiveFloat = Field(2.0, description="largest side of that canvas, in sides of the photo")
    colour: Share = Field(0.5, description="brightness, contrast, saturation and hue")
    mosaic: Share = Field(0.0, description="four photos on one canvas")
    mixup: Share = Field(0.0, description="another photo blended in, its objects added")
    copy_paste: Share = Field(0.0, description="one to three objects of another photo laid over this one")
    close_epochs: int = Field(0, ge=0, description="last epochs trained with flip and colour only")


# Backbones known by name that torchvision lacks, and what timm calls them.
TIMM = {
    "mobilenet_v1": "mobilenetv1_100",
    "inception_v4": "inception_v4",
    "inception_resnet_v2": "inception_resnet_v2",
    "se_resnet50": "seresnet50",
    "senet154": "senet154",
}


class Backbone(Settings):
    """The network that turns an image into feature maps. Names are torchvision's, but for those of TIMM."""

    name: Literal[
        "alexnet", "googlenet", "inception_v3",
        "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
        "resnet18", "resnet34", "resnet50", "resnet101",
        "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
        "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
        "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
        "convnext_tiny", "convnext_small", "convnext_base", "convnext_large",
        "mobilenet_v1", "inception_v4", "inception_resnet_v2", "se_resnet50", "senet154",
        "csp", "timm",
    ]  # fmt: skip
    model: str | None = Field(None, description="name timm: the network's name there, such as regnety_004")
    strides: tuple[Literal[4, 8, 16, 32], ...] = Field(
        (8, 16, 32), min_length=1, description="of the maps handed on, finest first; stages after the last are left out"
    )
    width: PositiveFloat = Field(
        1.0, description="mobilenet_v2, csp: factor on the channels; the others come as they are"
    )
    freeze: int = Field(
        0, ge=0, le=5, description="stages kept as loaded, counted from the image; with weights: none, none"
    )
    frozen_bn: bool = Field(False, description="BatchNorm keeps its loaded statistics, weights and biases; likewise")
    own_layers: bool = Field(False, description="model.norm and model.activation change only neck and head")

    @model_validator(mode="after")
    def _width(self) -> Backbone:
        if self.width != 1 and self.name not in ("mobilenet_v2", "csp"):
            raise ValueError(f"width is for mobilenet_v2 and csp; {self.name} has only 1.0")
        return self

    @model_validator(mode="after")
    def _model(self) -> Backbone:
        if (self.model is None) == (self.name == "timm"):
            raise ValueError("name: timm needs model, timm's name of a network; with another name, leave model out")
        return self

    @property
    def timm(self) -> str | None:
        """timm's name of the network, if it comes from there."""
        return self.model or TIMM.get(self.name)

    @model_validator(mode="after")
    def _doubling(self) -> Backbone:
        if any(coarse != 2 * fine for fine, coarse in pairwise(self.strides)):
            raise ValueError(f"each of strides is twice the one before, as in [4, 8, 16, 32], not {list(self.strides)}")
        return self


class SSDExtras(Settings):
    """The SSD paper's neck: two backbone maps (L2Norm on VGG's conv4_3) and extra stride-2 convolutions."""

    name: Literal["ssd_extras"] = "ssd_extras"
    levels: int = Field(6, ge=2, le=7, description="feature maps in all")
    reduced_fc: bool = Field(False, description="VGG as in the paper: L2Norm on conv4_3, fc6 and fc7 as convolutions")


class PAN(Settings):
    """Path aggregation network: a top-down and a bottom-up pass over strides 8, 16, 32 (and 64 and so on)."""

    name: Literal["pan"] = "pan"
    channels: PositiveInt = 96
    levels: int = Field(3, ge=3, le=5)
    block: Literal["separable", "csp"] = Field(
        "separable", description="depthwise-separable 5x5 convolutions, or plain 3x3 ones on half the channels (CSP)"
    )


class FPN(Settings):
    """Feature pyramid network (Lin 2017): a top-down pass over the backbone's maps (and 64 and so on)."""

    name: Literal["fpn"] = "fpn"
    channels: PositiveInt = 256
    levels: int = Field(5, ge=1, le=6)
    norm: Literal["batch", "none"] = Field("batch", description="after each convolution; none: a bias instead")
    coarser: Literal["conv", "pool"] = Field(
        "conv", description="levels beyond the backbone's: stride-2 convolutions, or every other cell (R-CNN)"
    )


class NoNeck(Settings):
    """The backbone's maps as they are."""

    name: Literal["none"] = "none"


Neck = Annotated[SSDExtras | PAN | FPN | NoNeck, Field(discriminator="name")]


class HeadSettings(Settings):
    """What the settings of all heads can be asked. necks: names of those that the head goes with; empty: any."""

    necks: ClassVar[tuple[str, ...]] = ()

    def default_boxes(self) -> SSD | None:
        """The settings of default boxes that `detkit data stats` can fit to a data set, if the head has any."""
        return None


class SSD(HeadSettings):
    """SSD head (Liu 2016): default boxes on every level, class scores and box offsets by convolution."""

    name: Literal["ssd"] = "ssd"
    scales: tuple[PositiveFloat, ...] = Field(
        description="size of the default boxes of each level and one more, as a share of the canvas"
    )
    ratios: tuple[tuple[PositiveFloat, ...], ...] = Field(
        description="aspect ratios of each level beside 1; each is used both ways up"
    )
    steps: tuple[PositiveFloat, ...] | None = Field(None, description="pixels between boxes; default: the strides")
    extra_square: bool = Field(True, description="a second square box, between this level's scale and the next")
    tower: int = Field(0, ge=0, le=4, description="depthwise-separable convolutions before the two predictors")
    loss: Literal["multibox", "aligned"] = Field(
        "multibox", description="the paper's loss, or task-aligned assignment with quality-aware scores and GIoU"
    )
    match_iou: Share = Field(0.5, description="multibox: IoU from which a default box is positive")
    negatives: PositiveFloat = Field(3.0, description="multibox: hard negatives a positive")
    variances: tuple[PositiveFloat, PositiveFloat] = (0.1, 0.2)
    top_candidates: PositiveInt = Field(13, description="aligned: default boxes that may answer for one object")
    smoothing: Share = Field(0.0, description="label smoothing of the class loss")
    box_weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _levels(self) -> SSD:
        if len(self.scales) != len(self.ratios) + 1:
            raise ValueError(f"{len(self.ratios)} levels of ratios need {len(self.ratios) + 1} scales")
        if self.steps is not None and len(self.steps) != len(self.ratios):
            raise ValueError(f"{len(self.ratios)} levels of ratios need as many steps")
        return self

    def default_boxes(self) -> SSD | None:
        """These."""
        return self

    def spacing(self, strides: tuple[int, ...]) -> tuple[float, ...]:
        """Pixels between the default boxes of each level, for maps of these strides."""
        return self.steps or tuple(map(float, strides))


class YOLO(HeadSettings):
    """Modern YOLO head: one anchor-free candidate a cell, decoupled branches, task-aligned assignment (TOOD), box sides
    as distributions (distribution focal loss, Li 2020)."""

    necks: ClassVar[tuple[str, ...]] = ("pan", "fpn", "none")

    name: Literal["yolo"] = "yolo"
    channels: PositiveInt = Field(64, description="of the two branches (classes, box) on each level")
    convs: int = Field(1, ge=0, le=4, description="3x3 convolutions of each branch before its predictor")
    bins: int = Field(
        16, ge=2, le=64, description="values of a side's distribution: a box reaches bins - 1 strides from its cell"
    )
    top_candidates: PositiveInt = Field(10, description="cells that may answer for one object")
    smoothing: Share = Field(0.0, description="label smoothing of the class loss")
    class_weight: PositiveFloat = Field(1.0, description="factor on the quality-aware class loss")
    box_weight: PositiveFloat = Field(2.5, description="factor on the complete-IoU loss of boxes")
    dfl_weight: PositiveFloat = Field(0.5, description="factor on the distribution focal loss of sides")


class YOLOv1(HeadSettings):
    """YOLO as first published (Redmon 2016): a grid of cells, each with a few boxes and one class distribution, from
    fully connected layers, so that the canvas can't change; squared errors."""

    necks: ClassVar[tuple[str, ...]] = ("none",)

    name: Literal["yolo_v1"] = "yolo_v1"
    grid: int = Field(7, ge=1, le=32, description="cells along each side (S); at most one object of each is learnt")
    boxes: int = Field(2, ge=1, le=8, description="boxes that a cell predicts (B); the best one answers for its object")
    channels: PositiveInt = Field(1024, description="of the 3x3 convolutions on the backbone's last map")
    hidden: PositiveInt = Field(4096, description="width of the first fully connected layer")
    dropout: float = Field(0.5, ge=0, lt=1, description="after that layer")
    box_weight: PositiveFloat = Field(5.0, description="factor on the errors of centres and sides (lambda coord)")
    empty_weight: PositiveFloat = Field(0.5, description="factor on the confidence of boxes without object (noobj)")


class FasterRCNN(HeadSettings):
    """Faster R-CNN (Ren 2015): a region proposal network (RPN) on every level, then a second look at each region. The
    defaults are torchvision's, for photos of some 800 pixels."""

    necks: ClassVar[tuple[str, ...]] = ("fpn", "pan", "none")

    name: Literal["faster_rcnn"] = "faster_rcnn"
    anchor_sizes: tuple[tuple[PositiveFloat, ...], ...] = Field(
        ((32,), (64,), (128,), (256,), (512,)), min_length=1, description="sides of each level's anchors, in pixels"
    )
    anchor_ratios: tuple[PositiveFloat, ...] = Field((0.5, 1.0, 2.0), min_length=1, description="height over width")
    anchor_centre: Share = Field(
        0.0, description="where in its cell an anchor stands: 0 fits 3x3 convolutions of stride 2, 0.5 pools (VGG)"
    )
    rpn_convs: PositiveInt = Field(1, description="3x3 convolutions of the RPN before its two predictors")
    rpn_iou: tuple[Share, Share] = Field(
        (0.3, 0.7), description="IoU with every object below which an anchor is negative; with one, from which positive"
    )
    rpn_samples: PositiveInt = Field(256, description="anchors of an image that the RPN's loss looks at")
    rpn_positives: Share = Field(0.5, description="largest share of positives among them")
    candidates: PositiveInt = Field(1000, description="best anchors of a level that reach the proposals' NMS")
    proposals: PositiveInt = Field(1000, description="regions of an image that are looked at again")
    train_candidates: PositiveInt = Field(2000, description="the same in training")
    train_proposals: PositiveInt = Field(2000, description="the same in training, before samples are taken")
    proposal_iou: Share = Field(0.7, description="NMS of proposals: one that overlaps a better one by more goes")
    samples: PositiveInt = Field(512, description="regions of an image that the second loss looks at")
    positives: Share = Field(0.25, description="largest share of positives among them")
    match_iou: Share = Field(0.5, description="IoU from which a region is positive for an object")
    pool: Literal["align", "max"] = Field(
        "align", description="a region's features: RoIAlign (He 2017), or RoI pooling (Girshick 2015; one level only)"
    )
    pool_size: PositiveInt = Field(7, description="cells along each side of a region's features")
    pool_samples: PositiveInt = Field(2, description="align: samples along each side of a cell")
    pool_levels: PositiveInt = Field(4, description="finest levels that features are taken from")
    pool_side: PositiveFloat = Field(224, description="side in pixels of regions whose features have stride 16")
    convs: int = Field(0, ge=0, le=8, description="3x3 convolutions with BatchNorm on a region's features")
    fcs: PositiveInt = Field(2, description="fully connected layers after them")
    width: PositiveInt = Field(1024, description="of the fully connected layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="after each of them")
    variances: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.1, 0.2), description="scale of the second look's offsets: centres, sides"
    )
    beta: PositiveFloat = Field(1 / 9, description="offset error at which smooth L1 turns from squared to linear")
    smoothing: Share = Field(0.0, description="label smoothing of the second class loss")

    @model_validator(mode="after")
    def _consistent(self) -> FasterRCNN:
        if len({len(sizes) for sizes in self.anchor_sizes}) != 1 or not self.anchor_sizes[0]:
            raise ValueError("anchor_sizes needs as many sizes on each level, for the levels share the RPN")
        if self.rpn_iou[0] > self.rpn_iou[1]:
            raise ValueError(f"rpn_iou is [negative below, positive from], not {list(self.rpn_iou)}")
        if self.pool == "max" and min(self.pool_levels, len(self.anchor_sizes)) > 1:
            raise ValueError("pool max is for one level: set pool_levels to 1, or pool to align")
        return self


Head = Annotated[SSD | YOLO | YOLOv1 | FasterRCNN, Field(discriminator="name")]


class Select(Settings):
    """Which boxes are kept: top-k, then NMS a class."""

    nms: Literal["hard", "none"] = Field(
        "hard", description="none: the candidates as they are, for what comes after the network to merge"
    )
    score: Share = Field(0.01, description="lowest score kept")
    iou: Share = Field(0.45, description="NMS: a box that overlaps a better one of its class by more goes")
    agnostic: bool = Field(False, description="NMS: or a better one of any class")
    candidates: PositiveInt = Field(1000, description="best (box, class) pairs of an image that reach NMS")
    keep: PositiveInt = Field(200, description="most detections an image")
    follow: bool = Field(
        True, description="training raises keep and candidates to what its densest photo needs; false: they are as set"
    )

    @property
    def room(self) -> int:
        """Most boxes of an image that leave the network."""
        return self.candidates if self.nms == "none" else self.keep

    def raised(self, most: int) -> Select:
        """With room for photos of `most` objects, if it follows: twice as many boxes, and five times those before NMS,
        as 1000 are for 200. Never less room than there is."""
        if not self.follow:
            return self
        keep = max(self.keep, 2 * most)
        return self.model_copy(update={"keep": keep, "candidates": max(self.candidates, 10 * most)})


class Model(Settings):
    """The detector."""

    backbone: Backbone
    neck: Neck
    head: Head
    select: Select = Select()
    weights: str = Field(
        "none",
        description="none | a .pth or .safetensors of torchvision's or timm's key names | a checkpoint of detkit, "
        "whose classes may be others (--init) | torchvision (the reference detector) | imagenet or a torchvision "
        "weights name such as VGG16_Weights.IMAGENET1K_V1 (downloaded)",
    )
    norm: Literal["bn", "group", "sync_bn", "frozen"] = Field(
        "bn",
        description="every BatchNorm as it is, as GroupNorm, with statistics over all GPUs, or with its loaded "
        "statistics, weights and biases kept (weights: none keeps none)",
    )
    activation: Activation | None = Field(None, description="in place of every ReLU and the like; default: as built")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of channels of the head's maps dropped in training")
    init: Init | None = Field(
        None, description="weights of backbone and neck that are not loaded; kaiming is He's; default: each network's"
    )

    @model_validator(mode="after")
    def _norm(self) -> Model:
        if self.norm == "group" and self.backbone.frozen_bn and not self.backbone.own_layers:
            raise ValueError("backbone.frozen_bn keeps BatchNorm, which norm: group takes out; set backbone.own_layers")
        return self

    @model_validator(mode="after")
    def _neck(self) -> Model:
        if self.head.necks and self.neck.name not in self.head.necks:
            raise ValueError(f"the head {self.head.name} goes with neck {' or '.join(self.head.necks)}")
        return self


class OptimizerSettings(Settings):
    """What every optimiser can be told. Its own settings have the names of torch's arguments."""

    name: str
    lr: PositiveFloat
    backbone_lr: PositiveFloat = Field(1.0, description="factor on the backbone's learning rate")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="each stage of the backbone learns at this factor of the next one's rate"
    )
    weight_decay: float = Field(5e-4, ge=0, description="not applied to norms and biases")


class SGD(OptimizerSettings):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: Decay = 0.9
    nesterov: bool = Field(True, description="Nesterov's momentum; with momentum 0 there is none")


class Adagrad(OptimizerSettings):
    """AdaGrad (Duchi 2011)."""

    name: Literal["adagrad"] = "adagrad"
    lr_decay: float = Field(0.0, ge=0)
    initial_accumulator_value: float = Field(0.0, ge=0)
    eps: PositiveFloat = 1e-10


class RMSprop(OptimizerSettings):
    """RMSProp (Hinton 2012)."""

    name: Literal["rmsprop"] = "rmsprop"
    momentum: Decay = 0.0
    alpha: Decay = Field(0.99, description="decay of the mean square")
    eps: PositiveFloat = 1e-8
    centered: bool = Field(False, description="by the variance instead of the mean square")


class AdamSettings(OptimizerSettings):
    """What Adam and AdamW have."""

    momentum: Decay = Field(0.9, description="beta1")
    betas: tuple[Decay, Decay] | None = Field(None, description="both of them; default: momentum and 0.999")
    eps: PositiveFloat = 1e-8
    amsgrad: bool = False


class Adam(AdamSettings):
    """Adam (Kingma & Ba 2015): weight decay is part of the gradient."""

    name: Literal["adam"] = "adam"


class AdamW(AdamSettings):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"


class Muon(OptimizerSettings):
    """Muon (Jordan 2024), fast from random weights; what is no matrix moves as with AdamW."""

    name: Literal["muon"] = "muon"
    momentum: Decay = 0.95


Optimizer = Annotated[SGD | Adagrad | RMSprop | Adam | AdamW | Muon, Field(discriminator="name")]

# What each schedule has of its own.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "step": ("step_size", "gamma"),
    "multistep": ("milestones", "gamma"),
    "cosine": ("final",),
    "one_cycle": ("pct_start", "div_factor", "final_div_factor"),
    "polynomial": ("power", "final"),
    "plateau": ("gamma", "patience", "final"),
}


class Schedule(Settings):
    """The learning rate over the run: a linear warm-up, times what the name says."""

    name: Literal["step", "multistep", "cosine", "one_cycle", "polynomial", "plateau"] = "cosine"
    warmup_steps: int = Field(500, ge=0)
    final: Share = Field(
        0.01, description="cosine, polynomial: last rate as a share of the first; plateau: least rate likewise"
    )
    step_size: float = Field(0.3, gt=0, le=1, description="step: share of the run from one fall to the next")
    milestones: tuple[Share, ...] = Field((0.67, 0.89), description="multistep: shares of the run")
    gamma: Share = Field(0.1, description="step, multistep, plateau: factor at each fall")
    pct_start: Share = Field(0.3, description="one_cycle: share of the run in which the rate rises")
    div_factor: PositiveFloat = Field(25.0, description="one_cycle: highest rate over the first")
    final_div_factor: PositiveFloat = Field(1e4, description="one_cycle: first rate over the last")
    power: PositiveFloat = Field(1.0, description="polynomial: its exponent")
    patience: int = Field(
        3, ge=0, description="plateau: evaluations in a row without a better mAP that are borne before the rate falls"
    )

    @model_validator(mode="after")
    def _own(self) -> Schedule:
        """Refuse what another schedule has, but at its default, as in a config with every setting resolved."""
        for key in set().union(*SCHEDULES.values()) - set(SCHEDULES[self.name]):
            if getattr(self, key) != type(self).model_fields[key].default:
                others = ", ".join(name for name, own in SCHEDULES.items() if key in own)
                raise ValueError(
                    f"{key} is of {others}, not of {self.name}: leave it out, or give the group whole, such as "
                    f"train.schedule={{name: {self.name}}}"
                )
        return self


class Train(Settings):
    """How the detector is trained."""

    epochs: PositiveInt | None = Field(None, description="length of the run; or iterations")
    iterations: PositiveInt | None = Field(None, description="length of the run in optimiser steps, instead of epochs")
    batch_size: PositiveInt | Literal["auto"] = Field(
        description="images of an optimiser step, of all processes and micro-batches together; auto: as many as fit "
        "into memory, a power of two times the parts"
    )
    accumulate: PositiveInt = Field(
        1, description="micro-batches that each process does its part of a step in, where memory is short"
    )
    scaling: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="none: batch_size and optimizer.lr hold whatever the number of processes; linear, sqrt: batch_size "
        "is each process' own, and the rate grows with their number (Goyal 2017) or its root",
    )
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    progressive: tuple[tuple[Share, Share], ...] = Field(
        (), description="pairs (s, c): until share s of the epochs, train on a canvas of share c of input.size"
    )
    multi_scale: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None, description="least and largest share of that canvas: each step's is drawn between, in multiples of 32 px"
    )
    sampler: Literal["shuffle", "repeat-factor"] = Field(
        "shuffle", description="each photo once an epoch, or those with rare classes more often (LVIS)"
    )
    repeat_threshold: Share = Field(
        0.01, description="repeat-factor: photos repeat with a class that fewer than this share of photos have"
    )
    decode: Literal["full", "reduced"] = Field(
        "reduced", description="JPEGs in full, or at their own 1/2, 1/4 or 1/8 where that leaves enough pixels"
    )
    cache: Literal["none", "ram", "disk"] = Field(
        "none", description="keep the photos decoded, at the canvas' resolution: in memory, or a file in data.cache"
    )
    recalibrate_bn: int = Field(
        0, ge=0, description="batches over which the loaded backbone's BatchNorm statistics are measured anew at first"
    )
    clip_norm: float = Field(10.0, ge=0, description="largest gradient norm; 0: no clipping")
    skip: int = Field(
        0, ge=0, description="steps of the run left out where loss or gradient is not finite; at one more it ends"
    )
    ema: float = Field(0.9998, ge=0, lt=1, description="decay of the moving average of the weights; 0: none")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = Field(False, description="torch.compile backbone and neck, anew for each size of canvas")
    eval_every: PositiveInt = Field(1, description="epochs between evaluations")
    overfit: int = Field(
        0, ge=0, description="train on only so many photos of the split, and evaluate on the same; 0: all"
    )
    until: Share = Field(0.0, description="end the run once an evaluation's mAP50 is this high; 0: after all epochs")
    patience: int = Field(
        0, ge=0, description="end the run after so many evaluations in a row without a better mAP; 0: after all epochs"
    )
    unfreeze: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0, le=5)]], ...] = Field(
        (), description="pairs (e, n): after e epochs, the backbone's first n stages are frozen, not backbone.freeze"
    )
    save_steps: int = Field(
        500, ge=0, description="optimiser steps between states to resume from, beside each epoch's end; 0: only there"
    )
    timeout: PositiveFloat = Field(
        600, description="several processes: seconds without a word after which one is taken for hung"
    )
    workers: int = Field(2, ge=0, description="loader processes of each training process")
    device: Device = "auto"
    seed: int = Field(0, ge=0)
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="where the run is recorded beside its CSV files; mlflow and wandb are extras"
    )
    histograms: int = Field(
        0, ge=0, description="epochs between histograms of weights and activations, at the next evaluation; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _loggers(cls, tree: Any) -> Any:
        """What checkpoints say that were written when TensorBoard was all there was."""
        if isinstance(tree, dict) and isinstance(tree.get("tensorboard"), bool) and "loggers" not in tree:
            tree = dict(tree)
            tree["loggers"] = ("tensorboard",) if tree.pop("tensorboard") else ()
        return tree

    @model_validator(mode="after")
    def _length(self) -> Train:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("set either epochs or iterations, and the other to null")
        return self

    def due(self, epoch: int, every: int) -> bool:
        """Whether what comes every so many epochs (0: never) is due at the evaluation after an epoch (0-based)."""
        return every > 0 and (epoch + 1) // every > (epoch + 1 - self.eval_every) // every

    @property
    def images(self) -> int:
        """`batch_size`, which in a run is a number."""
        assert self.batch_size != "auto"
        return self.batch_size

    def steps(self, epoch: int) -> int:
        """Optimiser steps of the run, for so many an epoch."""
        return self.iterations or (self.epochs or 0) * epoch

    @model_validator(mode="after")
    def _scales(self) -> Train:
        if self.multi_scale and self.multi_scale[0] > self.multi_scale[1]:
            raise ValueError(f"multi_scale is [least, largest], not {list(self.multi_scale)}")
        return self

    @model_validator(mode="after")
    def _pieces(self) -> Train:
        if self.batch_size == "auto":
            if self.scaling != "none":
                raise ValueError(f"scaling {self.scaling} grows with batch_size, which auto leaves open: give a number")
        elif self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulate, {self.accumulate}")
        return self

    def canvas(self, size: tuple[int, int], epoch: int, step: int = 0, epochs: int | None = None) -> tuple[int, int]:
        """Height and width of the training canvas in an epoch and a step of the run (0-based): `size`, or what
        `progressive` and `multi_scale` make of it, in multiples of 32. Depends on the seed and these alone.
        epochs: of the run, begun ones included; default: as set."""
        length = epochs or self.epochs or 0
        share = next((share for until, share in self.progressive if epoch < until * length), 1.0)
        if self.multi_scale:
            share *= random.Random(f"{self.seed} {step}").uniform(*self.multi_scale)
        elif share == 1:
            return size
        return max(32, round(size[0] * share / 32) * 32), max(32, round(size[1] * share / 32) * 32)

    def largest_canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that no canvas of the run exceeds."""
        share = self.multi_scale[1] if self.multi_scale else 1.0
        return max(size[0], round(size[0] * share / 32) * 32), max(size[1], round(size[1] * share / 32) * 32)


class Config(Settings):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="the run's folder is <runs>/<name>-<n>")
    runs: Path = Path("runs")
    data: Data
    input: Input
    augment: Augment = Augment()
    model: Model
    train: Train

    def frozen(self, epoch: int) -> int:
        """Stages of the backbone that are frozen in an epoch (0-based)."""
        if self.model.weights == "none":
            return 0
        past = [pair for pair in self.train.unfreeze if pair[0] <= epoch]
        return max(past)[1] if past else self.model.backbone.freeze


def shipped() -> Path:
    """The folder of the configs that come with detkit: inside the wheel, or the checkout's own."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def find(name: str | Path) -> Path:
    """The config file `name`: as a path, in ./configs, or among those shipped. Raises UserError with the nearest."""
    name = Path(name)
    folders = (Path("configs"), shipped())
    candidates = [name, *(folder / name for folder in folders)]
    if not name.suffix:
        candidates += [path.with_suffix(".yaml") for path in candidates]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(f"{name}: no such config{nearest(name.name, known)}; shipped: {', '.join(known)}")


def _models(annotation: object) -> Iterator[type[Settings]]:
    """The Settings classes inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _models(part)


def fields(model: type[Settings] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting's dotted name and what it is, groups included; a name once for each class that has it."""
    for key, field in model.model_fields.items():
        yield prefix + key, field
        for inner in _models(field.annotation):
            yield from fields(inner, f"{prefix}{key}.")


@cache
def names() -> frozenset[str]:
    """Every setting's dotted name, groups included."""
    return frozenset(name for name, _ in fields())


def put(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Set what has that dotted name in a config tree, in place. Raises UserError where no setting has it."""
    if dotted not in names():
        raise UserError(f"no setting '{dotted}'{nearest(dotted, names())}")
    *groups, key = dotted.split(".")
    node = tree
    for group in groups:
        node = node.setdefault(group, {})
        if not isinstance(node, dict):
            raise UserError(f"'{group}' is not a group of settings in this config")
    node[key] = value


def override(tree: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``a.b=VALUE`` assignments (values in YAML) to a config tree, in place."""
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as name=value, such as train.epochs=5")
        try:
            put(tree, dotted, yaml.safe_load(text))
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: the value is not YAML; quote it") from None
        except UserError as error:
            raise UserError(f"--set {assignment}: {error}") from None


def parse(tree: object, source: str) -> Config:
    """A Config from plain data. Raises UserError, one line, naming `source` and the setting."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_reason(error.errors()[0])}") from None


def _reason(error: Any) -> str:
    """One of pydantic's errors as part of a line, with the setting's name."""
    known, kind = names(), error["type"]
    dotted, choice = "", ""
    for at, part in enumerate(error["loc"], 1):
        name = f"{dotted}.{part}".lstrip(".")
        if isinstance(part, int) or name in known or (kind == "extra_forbidden" and at == len(error["loc"])):
            dotted = name
        else:
            choice = part  # of a union; it is no part of the setting's name
    if kind == "extra_forbidden":
        if dotted in known:
            group = dotted.rpartition(".")[0]
            return f"'{dotted}' is no setting of {choice}; give the group whole, such as {group}={{name: {choice}}}"
        return f"no setting '{dotted}'{nearest(dotted, known)}"
    if kind == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "")
        return f"{dotted}.name: should be one of {tags}, not {tag}{nearest(tag, tags.split(', '))}"
    if kind == "literal_error" and len(choices := re.findall("'([^']+)'", error["ctx"]["expected"])) > 12:
        close = nearest(str(error["input"]), choices)
        return f"{dotted}: {error['input']!r:.60} is none of {len(choices)} names{close}; see detkit config --schema"
    if kind == "union_tag_not_found":
        return f"{dotted}.name: missing"
    reason = error["msg"].removeprefix("Value error, ")
    given = "" if kind in ("missing", "value_error") else f", not {error['input']!r}"
    return f"{dotted or 'config'}: {reason[:1].lower() + reason[1:]}{given[:120]}"


def load(name: str | Path, assignments: Sequence[str] = ()) -> Config:
    """Read the config `name` (see `find`) and apply ``--set`` assignments. Raises UserError."""
    path = find(name)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path}: not valid YAML{line}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a config: expected settings such as 'name:' and 'model:'")
    override(tree, assignments)
    return parse(tree, os.fspath(path))


# What `overfit` counts as learnt by heart, and what it leaves as it is by default.
LEARNT = 0.95
RESET = ("progressive", "multi_scale", "sampler", "patience", "unfreeze")


def overfit(settings: Config, photos: int) -> Config:
    """The config, changed to learn so many photos by heart: none of what keeps a detector from that (augmentation,
    dropout, label smoothing, weight decay), evaluated on the same photos, until mAP50 is `LEARNT`."""
    cfg, model = settings.train, settings.model
    head: dict[str, Any] = dict.fromkeys({"dropout", "smoothing"} & type(model.head).model_fields.keys(), 0.0)
    return settings.model_copy(
        update={
            "name": f"{settings.name}-overfit",
            "augment": Augment(flip=0, crop=0, colour=0),
            "model": model.model_copy(update={"dropout": 0.0, "head": model.head.model_copy(update=head)}),
            "train": cfg.model_copy(
                update={
                    "overfit": photos,
                    "until": LEARNT,
                    "epochs": 200,
                    "iterations": None,
                    "eval_every": 10,
                    "batch_size": max(1, min(cfg.batch_size, photos // 4)),
                    "optimizer": cfg.optimizer.model_copy(update={"weight_decay": 0.0}),
                    "schedule": cfg.schedule.model_copy(update={"warmup_steps": min(cfg.schedule.warmup_steps, 20)}),
                    "ema": min(cfg.ema, 0.9),
                    "workers": 0,
                    "accumulate": 1,
                    **{name: Train.model_fields[name].default for name in RESET},
                }
            ),
        }
    )


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None)
