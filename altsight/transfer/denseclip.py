"""DenseCLIP: semantic segmentation that is led by class names (Rao et al. 2022; specification 7 of related systems)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.mask_views import MaskView
from altsight.data.segmentation import read_splits
from altsight.evals.base import Result, View
from altsight.evals.segmentation import Windows, score
from altsight.evals.zeroshot import words
from altsight.transfer.base import FitConfig, ImageTower, fit, keep_encoder, known_by, need_text, prepared_for
from altsight.transfer.scoremaps import Prompting, ScoreMaps, check_dense
from altsight.transfer.segmenter import Segmenter, check_segmenting

FIT = FitConfig(epochs=80_000 * 32 / 20_210, batch=32)
"""80,000 iterations of 32 of ADE20K's 20,210 training images."""
OPTIM = OptimConfig(
    lr=1e-4,
    lr_base_batch=32,
    weight_decay=1e-4,
    betas=(0.9, 0.999),
    warmup_fraction=1500 / 80_000,
    schedule="linear",
    power=0.9,
    min_lr=1e-6,
)
BACKBONE_LR = 0.1
"""Factor on the learning rate of the image tower, and of the maps that are made of its layers."""


@dataclass(frozen=True)
class DenseCLIP:
    """Train a dual encoder on images with masks in the layout of ADE20K, and score the mean IoU on others."""

    data: str
    """Folder with images/{training,validation}, annotations/{training,validation} and classes.txt."""
    classes: str = ""
    """File of class names, one a line, in the order of the labels; empty: classes.txt in the folder."""
    prompting: Prompting = "post"
    """post: the image moves the classes' vectors; pre: it writes the prompts, one pass of the text tower an image;
    none: the vectors are the same for all images."""
    contexts: int = 8
    """Learned vectors before every class name."""
    room: int = 5
    """Tokens of the longest class name, start and end included."""
    decoder_layers: int = 3
    """Layers of the context decoder: 3 in the released settings, 6 in the paper's text."""
    channels: int = 256
    """Width of the Semantic FPN."""
    auxiliary: float = 0.4
    """Weight of the score maps' own loss."""
    temperature: float = 0.07
    """What the score maps are divided by in it."""
    size: int = 640
    """Side of the training views and of the test's windows in pixels; 512 for ResNets."""
    reduce_zero_label: bool = True
    """0 in a mask is nothing, and ignored; 1 is the first class. Otherwise 0 is the first class."""
    multi_scale: bool = False
    """Average six scales and their mirror images in the test."""
    drop_path: float = 0.1
    """Share of residual branches that a ViT drops, in its last block. [unconfirmed]"""
    view: MaskView = field(default_factory=MaskView)
    optim: OptimConfig = OPTIM
    fit: FitConfig = FIT

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return mean IoU (in `extra` that of every class) and pixel accuracy on the validation images.

        Raises:
            UserError: the view has no text tower or no map of single places, or the data or a setting cannot be used;
                nothing has been written then.
        """
        need_text(view, "denseclip")
        if self.contexts < 0 or self.temperature <= 0 or min(self.decoder_layers, self.channels) < 1:
            raise UserError(
                "score maps need a temperature above 0, no less than 0 vectors, and 1 layer and channel or more: mend "
                "--temperature, --contexts, --decoder-layers or --channels."
            )
        check_dense(view)
        check_segmenting(view.encoder, self.size, self.fit.micro_batch)
        training, validation = read_splits(Path(self.data), self.classes, self.reduce_zero_label)
        method = self.build(view, training.classes)
        identity = known_by(method, self, training.classes, classes="", multi_scale=False)
        data = prepared_for(training, Path(self.data), training.digest())
        trained = fit("denseclip", lambda: method, identity, self.optim, self.fit, data, out)
        assert isinstance(trained, Segmenter)
        keep_encoder(view, trained.encoder, out)
        return score(
            trained.logits,
            validation,
            Windows(self.size, view.encoder.config.normalization, self.multi_scale),
            task=Path(self.data).name,
            evaluator="denseclip",
            feature_point="four layers and score maps, fine-tuned",
            extra={"seed": self.fit.seed},
        )

    def build(self, view: View, names: tuple[str, ...]) -> Segmenter:
        """Return what is trained, with its initial weights.

        Raises:
            UserError: the view or the names do not fit.
        """
        tower = ImageTower(view, img_size=self.size, drop_path=self.drop_path)
        prompts = (self.prompting, self.contexts, self.room, self.decoder_layers)
        spoken = [words(name) for name in names]
        decoder = ScoreMaps(view, tower, spoken, *prompts, self.channels, self.temperature)
        decoder.init_weights(key(self.fit.seed, 0, "init").child("decoder"))
        rates = dict.fromkeys(("encoder.", "decoder.tower.", "decoder.maps."), BACKBONE_LR)
        return Segmenter(tower.encoder, decoder.to(view.device), self.view, self.auxiliary, rates=rates)
