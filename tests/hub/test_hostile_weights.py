"""Files that are no weights, or no longer: one sentence for each, whatever is in them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from altsight.core.errors import UserError
from altsight.hub.load import load_view

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(kind: str) -> bytes:
    """Return the bytes of a small file of weights."""
    state = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.ones(8)}
    if kind == "safetensors":
        return save(state)
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer, _use_new_zipfile_serialization=kind == "pth")
    return buffer.getvalue()


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_view(str(path), device="cpu")
    assert "\n" not in str(caught.value)


@FEW
@given(content=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors", "bin"])
def test_any_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    refused(tmp_path / f"weights.{suffix}", content)


@FEW
@given(data=st.data())
@pytest.mark.parametrize("kind", ["pth", "pt", "safetensors"])
def test_cut_and_flipped(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """`pt` is written in torch's format from before 1.6, a plain pickle."""
    content = bytearray(whole(kind))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    # Even an unharmed file is refused: two tensors are no encoder.
    refused(tmp_path / f"weights.{kind}", bytes(content))
