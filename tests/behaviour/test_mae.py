"""A small MAE on the sample clip art fills in held-out pictures better than any average of what is known would.

One run of 400 steps: a minute and a half on a core of its own.
"""

from __future__ import annotations

import altsight_samples
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from altsight.core.config import OptimConfig
from altsight.core.rng import key
from altsight.core.types import Batch
from altsight.data.prepare import read_pairs
from altsight.data.prepared import Prepared
from altsight.data.views import Crop
from altsight.evals.bootstrap import paired_difference
from altsight.evals.load import load_method
from altsight.losses.pixels import patchify
from altsight.methods.base import Corpus
from altsight.methods.mae import MAE
from altsight.nn.decoder import PixelDecoderConfig
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, Run, TrainConfig

pytestmark = pytest.mark.slow
STEPS, BATCH = 400, 64
PATCH, SIDE = 4, 8
HELD_OUT = 400
WHOLE = Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)

Errors = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def trained(sample_data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> MAE:
    """A MAE that regresses pixels as they are: normalised ones could not be compared with an average."""
    run = Run(
        "mae",
        MAE.Config(norm_pix=False, decoder=PixelDecoderConfig(width=64, depth=2, heads=4)),
        OptimConfig(lr=1.5e-3, lr_base_batch=0, warmup_fraction=0.1),
        EncoderConfig("vit_tiny_patch16_224", PATCH * SIDE, PATCH, width=96, depth=4, heads=4),
        DataConfig(str(sample_data.directory), Crop(scale=(0.5, 1.0)), workers=0),
        TrainConfig(samples=STEPS * BATCH, batch=BATCH, precision="fp32", device="cpu", log_every=20),
    )
    out = tmp_path_factory.mktemp("mae")
    pretrain(run, sample_data, out)
    method = load_method(out)[1]
    assert isinstance(method, MAE)
    return method


@pytest.fixture(scope="module")
def held_out(trained: MAE) -> Batch:
    """Pictures of the test split, uncropped, each with a mask of its own."""
    pairs = read_pairs(str(altsight_samples.path("clipart", "test")))
    prepare = trained.prepare(WHOLE, PATCH * SIDE)
    examples = [prepare(pairs.document(i, key(0, i)), key(0, i)) for i in range(min(HELD_OUT, len(pairs)))]
    tensors = {name: torch.stack([e[name] for e in examples if e is not None]) for name in ("image", "keep")}
    index = torch.arange(len(examples))
    return Batch(tensors, index, index)


def errors(pred: Tensor, batch: Batch) -> Errors:
    """Return the mean squared error over the masked patches of each image, pixels in [0, 1]: (n,).

    pred: (n, 3, H, W), or what can be broadcast to it.
    """
    pixels = batch["image"].float() / 255
    error = patchify((pred - pixels).square(), PATCH).mean(dim=-1)
    masked = torch.ones_like(error, dtype=torch.bool).scatter(1, batch["keep"], False)
    return ((error * masked).sum(dim=1) / masked.sum(dim=1)).double().numpy()


def visible_mean(batch: Batch) -> Tensor:
    """Return the mean colour of the visible patches of each image: (n, 3, 1, 1)."""
    patches = patchify(batch["image"].float() / 255, PATCH).unflatten(2, (PATCH * PATCH, 3)).mean(dim=2)
    return patches.gather(1, batch["keep"].unsqueeze(-1).expand(-1, -1, 3)).mean(dim=1)[:, :, None, None]


def nearest_visible(batch: Batch) -> Tensor:
    """Return each patch as the mean colour of the visible patch next to it: (n, 3, H, W)."""
    patches = patchify(batch["image"].float() / 255, PATCH).unflatten(2, (PATCH * PATCH, 3)).mean(dim=2)
    place = torch.stack([torch.arange(SIDE**2) // SIDE, torch.arange(SIDE**2) % SIDE], dim=1).float()
    distance = torch.cdist(place.expand(len(patches), -1, -1), place[batch["keep"]])
    nearest = batch["keep"].gather(1, distance.argmin(dim=2))
    colours = patches.gather(1, nearest.unsqueeze(-1).expand(-1, -1, 3)).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return colours.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


@pytest.fixture(scope="module")
def mean_picture(sample_data: Prepared) -> Tensor:
    """The average training picture (3, H, W): the mean patch of every place."""
    pictures = []
    for i in range(0, len(sample_data.source), 4):
        document = sample_data.source.document(i, key(0, i))
        pictures.append(WHOLE(document.images[0], PATCH * SIDE, key(0, i)).float() / 255)
    return torch.stack(pictures).mean(dim=0)


def test_it_fills_in_better_than_averages(trained: MAE, held_out: Batch, mean_picture: Tensor) -> None:
    filled = errors(trained.reconstruct(held_out), held_out)
    print(f"\nMAE: {filled.mean():.4f} over {len(filled)} images")
    for name, pred in (
        ("mean colour of what is visible", visible_mean(held_out)),
        ("mean picture of the data set", mean_picture),
        ("mean colour of the nearest visible patch", nearest_visible(held_out)),
    ):
        average = errors(pred, held_out)
        less = paired_difference(average, filled)
        print(f"{name}: {average.mean():.4f}, MAE is lower by {less.value:.4f} [{less.low:.4f}, {less.high:.4f}]")
        assert less.low > 0, name


def test_an_untrained_one_does_not(trained: MAE, held_out: Batch) -> None:
    """The comparison can fail: with fresh weights the same model is worse than the mean colour."""
    fresh = MAE(trained.config, Encoder(trained.encoder.config), Corpus())
    fresh.init_weights(key(0, 0, "init"))
    worse = paired_difference(errors(fresh.reconstruct(held_out), held_out), errors(visible_mean(held_out), held_out))
    assert worse.low > 0


def test_masked_patches_only_are_compared(held_out: Batch) -> None:
    few = held_out.part(0, 3)
    exact = few["image"].float() / 255
    assert errors(exact, few).max() == 0
    wrong = exact.clone()
    for row, keep in enumerate(few["keep"].tolist()):
        for patch in keep:
            top, left = patch // SIDE * PATCH, patch % SIDE * PATCH
            wrong[row, :, top : top + PATCH, left : left + PATCH] += 1
    assert errors(wrong, few).max() == 0
    assert errors(exact + 0.5, few) == pytest.approx(0.25)
