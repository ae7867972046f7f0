"""Where a run is, and what it was: the counters of the loop and the summary at its end."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from altsight.core.types import Batch


@dataclass
class State:
    """All that a checkpoint holds besides tensors."""

    data: str = ""
    """Hash of the data set that the run began with."""
    samples_seen: int = 0
    step: int = 0
    sample_hash: int = 0
    """Sum over all samples seen of a hash of (position, sample), modulo 2^64: equal sequences, equal hash."""
    bad: int = 0
    """Samples that were unusable and replaced."""
    skipped: int = 0
    """Steps that were not finite and left out."""
    flops: float = 0.0
    flops_per_sample: float = 0.0
    """Counted on the first batch of a stage, and kept: what a sample costs may depend on what is in it."""
    stage: int = -1
    """First step of the curriculum's stage that this was counted in."""
    wall_seconds: float = 0.0
    wait_seconds: float = 0.0

    def crossed(self, batch: int, every: int) -> bool:
        """Return whether the step of `batch` samples that just ended passed a multiple of `every` (0: never)."""
        return bool(every) and self.samples_seen // every > (self.samples_seen - batch) // every


@dataclass(frozen=True)
class Summary:
    """What a finished run was: the facts that the certificate of fairness compares."""

    name: str
    samples_seen: int
    steps: int
    sample_hash: str
    initial_encoder: str
    bad_samples: int
    skipped_steps: int
    flops: float
    wall_seconds: float
    wait_seconds: float
    parameters: dict[str, int]
    world_size: int
    precision: str
    device: str
    peak_memory_gb: float
    data: str
    final_loss: dict[str, float] = field(default_factory=dict)


class Meter:
    """Wall time and speed between log lines."""

    def __init__(self, state: State) -> None:
        self._tick = time.perf_counter()
        self._mark = (state.samples_seen, state.wall_seconds, state.wait_seconds, state.step)

    def restart(self) -> None:
        """Leave out the time since the last tick: a probe is not training."""
        self._tick = time.perf_counter()

    def tick(self, state: State, wait: float) -> None:
        """Add the time since the last tick to the state."""
        now = time.perf_counter()
        state.wall_seconds += now - self._tick
        state.wait_seconds += wait
        self._tick = now

    def since_last(self, state: State) -> dict[str, float]:
        """Return samples per second, the share of the time spent waiting for data and the wait a step, since last."""
        samples, wall, wait, step = self._mark
        seconds = max(state.wall_seconds - wall, 1e-9)
        self._mark = (state.samples_seen, state.wall_seconds, state.wait_seconds, state.step)
        waited = state.wait_seconds - wait
        return {
            "samples_per_s": (state.samples_seen - samples) / seconds,
            "data_wait": waited / seconds,
            "wait_ms": 1000 * waited / max(1, state.step - step),
        }


def sequence_hash(batch: Batch) -> int:
    """Hash (position, sample) of every sample and add the hashes up: the sum does not depend on ranks or batches."""
    mixed = batch.positions.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ batch.samples.numpy().astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return int((mixed ^ (mixed >> np.uint64(29))).sum().astype(np.int64))


def peak_memory(device: torch.device) -> float:
    """Return the largest memory this process has used: the GPU's if there is one, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
