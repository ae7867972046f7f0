"""What transfers share: the one loop, and the trainable copy of a dual encoder's image side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import Key, key, torch_seeded
from altsight.core.types import Batch, Outputs
from altsight.data.shapes import CLASSES, Shapes
from altsight.data.views import Crop
from altsight.evals import evaluate
from altsight.evals.base import View
from altsight.methods.base import Method
from altsight.methods.supervised import SupervisedPrepare
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.resample import resized
from altsight.transfer import find
from altsight.transfer.base import FitConfig, ImageTower, fit, freeze_unused, prepared_for, with_view
from tests.behaviour.conftest import shapes_task
from tests.toy import toy_clip


class Heads(Method):
    """The smallest transfer: a linear map on the mean patch."""

    optim: ClassVar[OptimConfig] = OptimConfig(lr=1e-3, lr_base_batch=0)

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder)
        with torch_seeded(key(0, 0, "head")):
            self.head = nn.Linear(encoder.width, len(CLASSES))

    def prepare(self, crop: Crop, size: int) -> SupervisedPrepare:
        return SupervisedPrepare(crop, size)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"classification": torch.tensor(len(batch))}

    def embed(self, batch: Batch, at: Key) -> Outputs:
        encoded = self.encoder(self.encoder.normalize(batch["image"]))
        logits = self.head(self.encoder.point(encoded, "mean")).float()
        return Outputs(local={"classification": F.cross_entropy(logits, batch["label"], reduction="sum")})


@dataclass(frozen=True)
class Settings:
    weights: str = "toy clip"


def train_heads(view: View, out: Path, epochs: float = 2) -> Method:
    how = FitConfig(epochs=epochs, batch=32, workers=0, precision="fp32")
    data = prepared_for(Shapes(128), Path("shapes"), "shapes")
    return fit("heads", lambda: Heads(resized(view.encoder)), Settings(), Heads.optim, how, data, out)


def test_fit_trains_a_copy_and_returns_its_last_weights(tmp_path: Path) -> None:
    view = toy_clip()
    before = {name: value.clone() for name, value in view.encoder.state_dict().items()}
    method = train_heads(view, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in view.encoder.state_dict().items())
    assert not torch.equal(method.encoder.state_dict()["backbone.norm.weight"], before["backbone.norm.weight"])
    again = train_heads(view, tmp_path)
    assert all(torch.equal(value, method.state_dict()[name]) for name, value in again.state_dict().items())


def test_fit_refuses_the_folder_of_another_run(tmp_path: Path) -> None:
    train_heads(toy_clip(), tmp_path)
    with pytest.raises(UserError, match="holds another run"):
        train_heads(toy_clip(), tmp_path, epochs=3)


@pytest.mark.parametrize(("epochs", "size", "samples"), [(2, 128, 256), (1.5, 100, 128), (0.01, 100, 32)])
def test_samples_are_whole_batches(epochs: float, size: int, samples: int) -> None:
    assert FitConfig(epochs=epochs, batch=32).samples(size) == samples


@pytest.mark.parametrize("how", [FitConfig(0, 32), FitConfig(-1, 32), FitConfig(1, 0)])
def test_no_training_is_refused(how: FitConfig) -> None:
    with pytest.raises(UserError, match=r"--fit\.epochs above 0 and --fit\.batch"):
        how.samples(100)


def pictures(n: int = 6) -> Tensor:
    view = toy_clip()
    source = Shapes(n, seed=7)
    return torch.stack([view.preprocess(source.image(i)) for i in range(n)])


def test_the_toy_knows_its_shapes() -> None:
    """What docs/results/transfer.md says of it, on 600 shapes that its training has not seen."""
    top1 = evaluate(toy_clip(), [shapes_task()], ["zeroshot"])[0]
    assert top1.metric == "top1" and top1.value == pytest.approx(0.688, abs=0.005)


def test_batch_norm_does_not_see_the_image_that_unused_parameters_are_found_with() -> None:
    encoder = Encoder(EncoderConfig("resnet18", img_size=32))
    encoder.init_weights(key(0, 0))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    freeze_unused(encoder, lambda encoded: encoded.layers[0], encoder.train())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert "backbone.conv1.weight" in trained and not any("layer4" in name for name in trained)


def test_messages_of_the_loop_name_the_settings_of_a_transfer(tmp_path: Path) -> None:
    view, data = toy_clip(), prepared_for(Shapes(8), Path("shapes"), "shapes")
    how = FitConfig(epochs=1, batch=8, workers=-1)
    with pytest.raises(UserError, match=r"--fit\.workers 0"):
        fit("heads", lambda: Heads(resized(view.encoder)), Settings(), Heads.optim, how, data, tmp_path)


def test_image_tower_is_the_image_side() -> None:
    view = toy_clip()
    tower = ImageTower(view).eval()
    images = pictures()
    with torch.no_grad():
        found = F.normalize(tower(tower.encoder(tower.encoder.normalize(images))), dim=1)
    torch.testing.assert_close(found, view.encode_image(images))
    trained = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert "encoder.backbone.norm.weight" in trained and "owner.image_projection.weight" in trained
    assert not any("text" in name or "logit_scale" in name for name in trained)


def test_image_tower_leaves_the_view_alone() -> None:
    view = toy_clip()
    before = view.encode_image(pictures())
    tower = ImageTower(view, drop_path=0.2)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(view.encode_image(pictures()), before)
    assert tower.encoder.config.drop_path == 0.2


def test_image_tower_needs_a_text_tower() -> None:
    view = toy_clip()
    view.text = None
    with pytest.raises(UserError, match="has no text tower"):
        ImageTower(view)


def test_with_view_reads_images_at_the_encoders_size() -> None:
    view = toy_clip()
    larger = with_view(view, resized(view.encoder, img_size=48))
    assert larger.preprocess.size == 48 and view.preprocess.size == 32
    assert larger.features(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).shape == (1, 64)


def test_unknown_transfer() -> None:
    with pytest.raises(UserError, match="Did you mean 'segment'"):
        find("segmnt")
