"""A small CLIP that knows the made-up shapes: the source model of the tests of transfer.

Its weights lie in tests/fixtures/toy_clip; `python -m tests.toy` trains them anew (minutes on one core).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from altsight.core.config import OptimConfig, write_json
from altsight.data.shapes import Shapes
from altsight.data.text import load_tokenizer, train_tokenizer
from altsight.data.views import Crop
from altsight.evals.base import View
from altsight.evals.load import load_method, view_of
from altsight.methods.base import Corpus
from altsight.methods.clip import CLIP
from altsight.nn.encoder import Encoder, EncoderConfig
from altsight.nn.text import TextConfig
from altsight.train.checkpoint import save
from altsight.train.loop import pretrain
from altsight.train.run import DataConfig, Run, TrainConfig, save_run
from altsight.transfer.base import prepared_for

HOME = Path(__file__).parent / "fixtures" / "toy_clip"
PROMPT = "a picture of a {}"
PAIRS, SAMPLES = 20_000, 300_000
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    width=64,
    depth=4,
    heads=4,
    positions="learned",
    normalization="half",
)
CONFIG = CLIP.Config(text=TextConfig(width=64, heads=4, layers=2, context=24), embed_dim=64)


def toy_clip() -> View:
    """Return the view; 32 pixels, "mean" of the patch tokens projected to 64 dimensions, text context 24."""
    return view_of(toy_method().eval(), "toy clip")


def toy_method() -> CLIP:
    """Return the method with its weights."""
    method = CLIP(CONFIG, Encoder(ENCODER), Corpus(load_tokenizer(str(HOME / "tokenizer.json"))))
    # Stored in half precision: the file is part of the repository.
    method.load_state_dict({name: value.float() for name, value in load_file(HOME / "model.safetensors").items()})
    return method


def write_toy_run(folder: Path) -> Path:
    """Write the toy as the folder of a finished run, for commands; return the folder."""
    folder.mkdir(parents=True)
    save_run(toy_run(), folder / "run.json")
    write_json(folder / "classes.json", [])
    shutil.copy(HOME / "tokenizer.json", folder / "tokenizer.json")
    save(folder / "checkpoints", SAMPLES, {"method": toy_method().state_dict(), "ema": None}, keep=1)
    return folder


def toy_run(samples: int = SAMPLES) -> Run[CLIP.Config]:
    """Return how the toy was trained."""
    optim = OptimConfig(lr=1e-3, lr_base_batch=0, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, warmup_fraction=0.05)
    data = DataConfig(crop=Crop(scale=(0.6, 1.0), ratio=(0.9, 1.1), flip=False), workers=0)
    return Run("clip", CONFIG, optim, ENCODER, data, TrainConfig(samples, 128, precision="fp32"))


def train(samples: int = SAMPLES) -> None:
    """Train the toy and store it."""
    source = Shapes(PAIRS)
    tokenizer = train_tokenizer((text for i in range(500) for text in source.texts(i)), 512)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        pretrain(toy_run(samples), replace(prepared_for(source, out, "shapes"), tokenizer=tokenizer), out)
        _, method = load_method(out)
        HOME.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "tokenizer.json", HOME / "tokenizer.json")
        save_file({name: value.half() for name, value in method.state_dict().items()}, HOME / "model.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(*map(int, sys.argv[1:]))
