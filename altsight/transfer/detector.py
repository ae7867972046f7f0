"""Mask R-CNN, torchvision's, on any encoder: large-scale jitter, a feature pyramid, and ViTDet's heads.

He et al. 2017; Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection" (specification D7).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from altsight.core.config import OptimConfig
from altsight.core.rng import Key, key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.data.decode import decode
from altsight.data.views import Crop
from altsight.methods.base import Method
from altsight.nn.encoder import Encoder
from altsight.nn.pyramid import Maps, make_pyramid
from altsight.transfer.jitter import DetectPrepare, fitted, padded, unpacked

RATIOS = (0.5, 1.0, 2.0)
"""Height : width of the anchors."""
ANCHOR = 8
"""Side of an anchor in strides of its level: 32 pixels at stride 4."""
BOX = 7
"""Side of what is pooled of a region for its class."""
LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposals",
    "loss_classifier": "classes",
    "loss_box_reg": "boxes",
    "loss_mask": "masks",
}
"""torchvision's names of the losses -> those in the log."""
_READ = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.", "blocks.")
"""What the last block of a ViT depends on."""

Detections = dict[str, Tensor]
"""boxes (n, 4): left, top, right, bottom in pixels; labels (n,); scores (n,); masks (n, 1, H, W) in [0, 1]."""


@dataclass(frozen=True)
class DetectorConfig:
    """Hyper-parameters of the detector at ViTDet's values."""

    masks: bool = True
    """Predict masks as well; switch off for sets that have boxes only."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """Range of the size at which an image is seen in training, in sizes of the input."""
    flip: bool = True
    """Mirror half of the images."""
    width: int = 256
    """Channels of the pyramid and of the convolutions in the heads."""
    hidden: int = 1024
    """Width of the fully connected layer of the box head."""
    most: int = 100
    """Objects of an image that are learned from; the largest are kept."""
    proposals: int = 1000
    """Regions of an image that the heads look at."""
    sampled: int = 512
    """Regions of an image that they learn from at a time."""


class Detector(Method):
    """Mask R-CNN on an encoder.

    L = objectness + boxes of the proposals + classes + boxes + masks, each averaged within an image first, then over
    images: so the gradient does not depend on how a batch is split. (torchvision averages over what was sampled in
    all images that are computed together, which differs where images yield different numbers.) What is sampled of an
    image is drawn by its position. Heads run in fp32.

    Args:
        encoder: what is trained; a map of its patches is what the pyramid reads.
        classes: number of classes without the background.
        frozen: keep the encoder as it is.
    """

    optim: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-4,
        lr_base_batch=0,
        weight_decay=0.1,
        betas=(0.9, 0.999),
        warmup_fraction=250 / 184_375,
        warmup_lr=1e-7,
        schedule="step",
        step_at=163_889 / 184_375,
        layer_decay=0.7,
    )
    Config = DetectorConfig

    def __init__(self, config: DetectorConfig, encoder: Encoder, classes: int, frozen: bool = False) -> None:
        super().__init__(encoder)
        self.config = config
        self.rcnn = _rcnn(config, encoder, classes)
        for name, parameter in encoder.backbone.named_parameters():
            if frozen or (encoder.is_vit and not name.startswith(_READ)):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Detector:
        """Switch to training mode, but for batch norm: a few large images make poor statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def prepare(self, crop: Crop, size: int) -> DetectPrepare:
        """Return the preparation: large-scale jitter in place of the study's crop."""
        c = self.config
        return DetectPrepare(size, self.encoder.config.normalization, c.masks, c.jitter, c.flip, c.most)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count images."""
        names = list(LOSSES.values()) if self.config.masks else list(LOSSES.values())[:-1]
        return dict.fromkeys(names, torch.tensor(len(batch), device=batch["image"].device))

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Return the losses of every image, summed over images."""
        maps = self._maps(batch["image"])
        sums: dict[str, Tensor] = {}
        for row, position in enumerate(batch.positions.tolist()):
            with torch_seeded(key(at.seed, position, "detect")):
                losses = self._image_losses(maps, batch, row)
            for name, value in losses.items():
                sums[LOSSES[name]] = sums[LOSSES[name]] + value if LOSSES[name] in sums else value
        return Outputs(local=sums)

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    @torch.inference_mode()
    def detect(self, images: Sequence[bytes]) -> list[Detections]:
        """Return what is found in encoded images, in their own pixels; their longer side is resized to the input's."""
        size, pixels, seen, whole = self.encoder.config.img_size, [], [], []
        for data in images:
            picture = decode(data)
            height, width = fitted(picture.shape[1], picture.shape[2], size)
            small = F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]
            pixels.append(padded(small, size, self.encoder.config.normalization))
            seen.append((height, width))
            whole.append((picture.shape[1], picture.shape[2]))
        device = next(self.parameters()).device
        maps = self._maps(torch.stack(pixels).to(device))
        with torch.autocast(device.type, enabled=False):
            proposals, _ = self.rcnn.rpn(_image_list(maps, size, seen), maps)
            found, _ = self.rcnn.roi_heads(maps, proposals, seen)
        return list(self.rcnn.transform.postprocess(found, seen, whole))

    def _maps(self, images: Tensor) -> Maps:
        encoded = self.encoder(self.encoder.normalize(images))
        return OrderedDict((name, level.float()) for name, level in self.rcnn.backbone(encoded).items())

    def _image_losses(self, maps: Maps, batch: Batch, row: int) -> dict[str, Tensor]:
        own = OrderedDict((name, level[row : row + 1]) for name, level in maps.items())
        count = int((batch["labels"][row] > 0).sum())
        target = {name: batch[name][row, :count] for name in ("boxes", "labels")}
        size = batch["image"].shape[-1]
        if self.config.masks:
            target["masks"] = unpacked(batch["masks"][row, :count], size)
        seen = [(int(batch["valid"][row, 0]), int(batch["valid"][row, 1]))]
        with torch.autocast(batch["image"].device.type, enabled=False):
            proposals, first = self.rcnn.rpn(_image_list(own, size, seen), own, [target])
            _, second = self.rcnn.roi_heads(own, proposals, seen, [target])
        return {**first, **second}


def _rcnn(config: DetectorConfig, encoder: Encoder, classes: int) -> Any:
    """Return torchvision's model with the pyramid as its backbone and ViTDet's heads; its own resizing is not used."""
    pyramid, width = make_pyramid(encoder, config.width), config.width
    settings: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((ANCHOR * stride,) for stride in pyramid.strides), (RATIOS,) * len(pyramid.strides)
        ),
        "rpn_head": RPNHead(width, len(RATIOS), conv_depth=2),
        "rpn_post_nms_top_n_train": config.proposals,
        "rpn_post_nms_top_n_test": config.proposals,
        "box_batch_size_per_image": config.sampled,
        "box_head": FastRCNNConvFCHead((width, BOX, BOX), [width] * 4, [config.hidden], LayerNorm2d),
    }
    if not config.masks:
        return FasterRCNN(pyramid, box_predictor=FastRCNNPredictor(config.hidden, classes + 1), **settings)
    return MaskRCNN(
        pyramid,
        box_predictor=FastRCNNPredictor(config.hidden, classes + 1),
        mask_head=MaskRCNNHeads(width, [width] * 4, 1, LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        **settings,
    )


def _image_list(maps: Maps, size: int, seen: list[tuple[int, int]]) -> ImageList:
    """Return what torchvision wants to know of the images: their size with padding, and without."""
    return ImageList(maps["0"].new_empty(1, 3, size, size).expand(len(seen), -1, -1, -1), seen)
