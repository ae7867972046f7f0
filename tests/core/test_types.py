"""Documents and batches."""

from __future__ import annotations

import torch

from altsight.core.types import Batch, Document, Image, Text


def test_document_keeps_images_and_texts_in_reading_order() -> None:
    document = Document((Text("a"), Image(b"1"), Text("b"), Image(b"2")), "id")
    assert document.texts == ("a", "b")
    assert document.images == (b"1", b"2")


def test_batch_parts_are_views_of_its_rows() -> None:
    batch = Batch({"images": torch.arange(12).view(4, 3)}, torch.arange(4) + 100, torch.tensor([7, 8, 9, 10]), ("bad",))
    part = batch.part(1, 3)
    assert len(batch) == 4
    assert len(part) == 2
    assert part["images"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert (part.positions.tolist(), part.samples.tolist()) == ([101, 102], [8, 9])
    assert part["images"].untyped_storage().data_ptr() == batch["images"].untyped_storage().data_ptr()


def test_moving_a_batch_keeps_what_it_says_about_its_samples() -> None:
    batch = Batch({"x": torch.ones(2)}, torch.arange(2), torch.arange(2), ("00000.tar#512 (broken)",))
    moved = batch.to(torch.device("meta"))
    assert moved["x"].device.type == "meta"
    assert moved.bad == batch.bad
    assert moved.positions.device.type == "cpu"
