"""Teachers: copies of modules that follow them at a distance, by an exponential moving average of the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from altsight.nn.encoder import Encoder


class Teacher(nn.ModuleDict):
    """Copies of `students` (name -> module), without a gradient.

    follows_mode: the copies are in training mode when the rest is (for batch norm in a momentum encoder); otherwise
    they always compute as in evaluation, without drop path.
    """

    def __init__(self, students: Mapping[str, nn.Module], follows_mode: bool = False) -> None:
        super().__init__({name: copy.deepcopy(module) for name, module in students.items()})
        self.follows_mode = follows_mode
        self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Teacher:
        """Switch to training mode, or stay in evaluation mode; returns self."""
        super().train(mode and self.follows_mode)
        return self

    @torch.no_grad()
    def copy_from(self, students: Mapping[str, nn.Module]) -> None:
        """Take over the students' weights."""
        for name, student in students.items():
            self[name].load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, students: Mapping[str, nn.Module], momentum: float) -> None:
        """Set every weight to momentum * its own + (1 - momentum) * the student's; buffers stay the teacher's own."""
        for name, student in students.items():
            mine, theirs = list(self[name].parameters()), list(student.parameters())
            torch._foreach_lerp_([p.data for p in mine], [p.data for p in theirs], 1 - momentum)


def teacher_encoder(teacher: Teacher) -> Encoder:
    """Return the module called "encoder" of `teacher`."""
    return cast(Encoder, teacher["encoder"])
