"""What all tests share: one CPU thread a process, and small prepared data from the embedded samples."""

from __future__ import annotations

from pathlib import Path

import altsight_samples
import pytest
import torch

from altsight.data.prepare import PrepareConfig, prepare
from altsight.data.prepared import Prepared, open_prepared

torch.set_num_threads(1)

CAPTIONS = ("{title}", "{title}, {tags}")


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The embedded clip art, train split, prepared once per session."""
    out = tmp_path_factory.mktemp("samples") / "clipart"
    prepare(PrepareConfig(str(altsight_samples.path("clipart", "train")), out, CAPTIONS, "label", vocab_size=2048))
    return open_prepared(out)


@pytest.fixture(scope="session")
def sample_path(sample_data: Prepared) -> Path:
    """Folder of `sample_data`."""
    return sample_data.directory
