"""Patches as words: the visual vocabularies that BEiT and SplitMask predict (specifications B2 and 6.2)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altsight.core.errors import UserError
from altsight.core.rng import Key
from altsight.nn.codebook import cut, load_codebook, nearest, random_projection

NETWORK_PATCH = 8
"""Pixels along the square that one token of an external network stands for (DALL-E's encoder halves three times)."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the words come from."""

    path: str = ""
    """Empty: random projection, words of noise drawn from the seed, which needs no training (SplitMask's default). A
    .safetensors file: a codebook that `altsight codebook` trained. Any other file: TorchScript of a network such as
    DALL-E's encoder, which maps images (B, 3, 8 H, 8 W) in [0.1, 0.9] to tokens (B, H, W) or logits (B, V, H, W)."""
    vocabulary: int = 8192
    zero_mean: bool = False
    """Random projection: words without a mean, so that a patch's brightness does not matter. For data in which one
    word stands for most of the patches (`top_word` in the log)."""


class PatchTokenizer(nn.Module):
    """Images -> one token per patch; never trained. Call `init_weights` before use and `check` before training.

    A codebook lies in the buffer `words` (V, 3 * patch * patch), so a run that goes on keeps the one it began with.
    An external network is neither saved nor moved with the method. A file that is missing is an error of `check` only:
    a finished run can be evaluated without it.
    """

    def __init__(self, config: TokenizerConfig, patch_size: int) -> None:
        super().__init__()
        if config.vocabulary < 2:
            raise UserError(
                f"a vocabulary of {config.vocabulary} leaves nothing to predict: raise --method.tokenizer.vocabulary."
            )
        self.config, self.patch_size = config, patch_size
        self.is_network = bool(config.path) and Path(config.path).suffix != ".safetensors"
        self.network: list[Any] = []
        if not self.is_network:
            self.register_buffer("words", torch.empty(config.vocabulary, 3 * patch_size**2))

    def init_weights(self, at: Key) -> None:
        """Set the words from `at` or from the file.

        Raises:
            UserError: the file cannot be read, or holds a codebook of another size.
        """
        path = Path(self.config.path)
        if not self.config.path:
            self.words = random_projection(self.config.vocabulary, self.patch_size, at, self.config.zero_mean)
        elif self.is_network:
            self.network = [_load_network(path)] if path.is_file() else []
        else:
            self.words = self._read(path) if path.is_file() else torch.zeros_like(self.words)

    def _read(self, path: Path) -> Tensor:
        words = load_codebook(path)
        if words.shape != self.words.shape:
            patch = round((words.shape[1] / 3) ** 0.5)
            raise UserError(
                f"the codebook '{path}' has {len(words)} words of {patch} x {patch} pixels, but the run has a "
                f"vocabulary of {self.config.vocabulary} and patches of {self.patch_size} x {self.patch_size}: train "
                "another, or set --method.tokenizer.vocabulary or --encoder.patch-size."
            )
        return words

    def check(self, size: int) -> None:
        """Raise UserError if the file is missing, or is no tokenizer for images of `size` x `size` pixels."""
        there = self.network if self.is_network else not self.config.path or bool(self.words.any())
        if not there:
            raise UserError(
                f"the file '{self.config.path}' of --method.tokenizer.path does not exist: train a codebook with "
                "`altsight codebook`, or leave the setting away."
            )
        if self.is_network:
            self(torch.zeros(1, 3, size, size))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the token of every patch (B, L) int64, row by row, of images (B, 3, H, W) fp32 in [0, 1]."""
        # In fp32 even under autocast: the tokens of an image must not depend on the precision of the training.
        with torch.autocast(images.device.type, enabled=False):
            if self.is_network:
                return self._ask_network(images.float())
            patches = cut(images.float(), self.patch_size)
            return nearest(patches.flatten(0, 1), self.words).view(patches.shape[:2])

    def _ask_network(self, images: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in images.shape[2:])
        size = (rows * NETWORK_PATCH, columns * NETWORK_PATCH)
        # The second, smaller copy of the crop. BEiT resizes it from the file by Lanczos; here from the crop itself.
        small = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        # The map keeps pixels off the ends of the range, where DALL-E's logit-Laplace likelihood is infinite.
        found = self.network[0].to(images.device)(0.8 * small + 0.1)
        tokens = found.argmax(dim=1) if found.ndim == 4 else found
        words = found.shape[1] if found.ndim == 4 else int(found.max()) + 1
        wanted = self.config.vocabulary
        if tuple(tokens.shape[1:]) != (rows, columns) or words > wanted or (found.ndim == 4 and words < wanted):
            made = " x ".join(str(side) for side in tokens.shape[1:])
            raise UserError(
                f"the tokenizer '{self.config.path}' makes {made} tokens out of {words} words from {size[0]} x "
                f"{size[1]} pixels, but the run wants {rows} x {columns} out of {wanted}: set "
                f"--method.tokenizer.vocabulary, or export a network that makes one token of {NETWORK_PATCH} x "
                f"{NETWORK_PATCH} pixels."
            )
        return tokens.flatten(1).long()


def _load_network(path: Path) -> Any:
    # TorchScript is on its way out, but the torch that still unpickles DALL-E's release knows no other format.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the tokenizer '{path}' is neither a codebook (.safetensors) nor TorchScript ({reason}): give another "
            "--method.tokenizer.path."
        ) from None
