"""What is trained for semantic segmentation: an encoder and any decoder that hands out logits of every place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.core.types import Batch, Outputs
from altsight.data.mask_views import MaskPrepare, MaskView
from altsight.data.segmentation import IGNORED
from altsight.data.views import Crop
from altsight.methods.base import Method
from altsight.nn.dense import is_plain, resize
from altsight.nn.encoder import Encoder


class Segmenter(Method):
    """Cross-entropy of every labelled pixel, for each set of logits that the decoder hands out.

    L = CE of "segmentation" + auxiliary * CE of "auxiliary", each meaned over the labelled pixels of the global batch;
    logits are brought to the mask's size before the softmax.

    Args:
        encoder: at the size of the views; with its weights, which `init_weights` leaves alone.
        decoder: (encoder, encoded images) -> loss name -> logits (B, classes, h, w) of any size: "segmentation", which
            predicts, and in training "auxiliary". With its weights, too.
        view: how training views are drawn.
        auxiliary: weight of the second loss; None: the decoder has none.
        frozen: train the decoder only.
        rates: prefix of parameter names -> factor on the learning rate.
    """

    # Batch norm in the head has no variance over a pooled context of one image.
    least_batch = 2

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        view: MaskView,
        auxiliary: float | None = None,
        frozen: bool = False,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(encoder)
        self.decoder, self.view, self.auxiliary, self.frozen = decoder, view, auxiliary, frozen
        self.rates = dict(rates or {})
        if frozen:
            encoder.requires_grad_(False)

    def prepare(self, crop: Crop, size: int) -> MaskPrepare:
        """Return the preparation: a view of the image with its mask; the views of pre-training are not used."""
        return MaskPrepare(self.view, size, self.encoder.config.normalization)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Count labelled pixels."""
        labelled = (batch["mask"] != IGNORED).sum()
        return {name: labelled for name in self._losses}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        """Predict every pixel."""
        target = batch["mask"].long()
        losses = {}
        for name, logits in self._decode(batch["image"]).items():
            wide = resize(logits, target.shape[1:])
            losses[name] = F.cross_entropy(wide, target, ignore_index=IGNORED, reduction="sum")
        return Outputs(local=losses)

    def weights(self) -> dict[str, float]:
        """Return the weight of the second loss."""
        return {} if self.auxiliary is None else {"auxiliary": self.auxiliary}

    def lr_scales(self) -> dict[str, float]:
        """Return the learning rates of parts."""
        return self.rates

    def no_weight_decay(self) -> set[str]:
        """Exempt the encoder's tokens and position table."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode; a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits fp32 (n, classes, S, S) of windows uint8 (n, 3, S, S), on the method's device."""
        device = next(self.parameters()).device
        return resize(self._decode(images.to(device))["segmentation"], images.shape[2:])

    @property
    def _losses(self) -> tuple[str, ...]:
        return ("segmentation",) if self.auxiliary is None else ("segmentation", "auxiliary")

    def _decode(self, images: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            encoded = self.encoder(self.encoder.normalize(images))
        found: dict[str, Tensor] = self.decoder(self.encoder, encoded)
        return found


def check_segmenting(encoder: Encoder, size: int, micro_batch: int) -> None:
    """Raise UserError if `encoder` cannot read views of `size` pixels, or the batch would be split."""
    if size < 1:
        raise UserError(f"views of {size} pixels show nothing: set --size above 0.")
    patch = int(encoder.backbone.feature_info[-1]["reduction"])
    if is_plain(encoder) and size % patch:
        near = max(size // patch, 1) * patch
        raise UserError(
            f"the size {size} is not divisible by the patch size {patch} of '{encoder.config.model}': set "
            f"--size {near} or {near + patch}."
        )
    if micro_batch:
        raise UserError(
            "the head normalises over what is computed at a time (batch norm), so a batch cannot be split: leave "
            "--fit.micro-batch at 0 and lower --fit.batch."
        )
