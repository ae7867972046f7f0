"""Video classification by Text4Vis: closed set, few-shot, and zero-shot on the classes of another data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from altsight.core import dist
from altsight.core.config import OptimConfig
from altsight.core.errors import UserError
from altsight.core.rng import key
from altsight.data.listing import check_labels, list_items, read_classes
from altsight.data.video import Videos, is_video
from altsight.data.views import Crop
from altsight.evals.base import Result, View
from altsight.evals.classes import words
from altsight.evals.templates import check_prompts
from altsight.evals.zeroshot import class_vectors
from altsight.train.run import weights_hash
from altsight.transfer.base import FitConfig, ImageTower, fit, keep_encoder, need_text, prepared_for
from altsight.transfer.classifiers import ClassifierInit, discriminants, normal, orthogonal
from altsight.transfer.text4vis import TemporalConfig, Text4Vis
from altsight.transfer.video_scores import half_classes, score, see

MEAN = TemporalConfig("mean")


@dataclass(frozen=True)
class NamedVideos:
    """Videos, and what their classes are called in prompts."""

    videos: Videos
    names: tuple[str, ...]


@dataclass(frozen=True)
class Video:
    """Train a video classifier from class names, and score it on other videos.

    Without `data` nothing is trained.
    """

    test: Path
    """Videos that it is scored on: a folder of class folders (of files, or of folders of frames), or a table (CSV, JSON
    lines) of path and label."""
    data: Path | None = None
    """Videos that it is trained on, in any of these layouts."""
    classes: Path | None = None
    """Classes of `data`, one a line, as `label` or `label | name`; without it, the labels that occur."""
    protocol: Literal["closed", "zeroshot"] = "closed"
    """closed: test videos have the classes of `data`. zeroshot: they have their own, and are told apart by their names
    alone, among all classes and among ten halves of them."""
    test_classes: Path | None = None
    """Classes of `test` where nothing is trained, or under zeroshot."""
    prompt: str = "a video of a person {}."
    """Sentence with `{}` for the name."""
    init: ClassifierInit = "text"
    """What the class matrix is made of."""
    trainable: bool = False
    """Train the class matrix, too."""
    lda_videos: int = 60
    """Most training videos of a class that `lda` reads."""
    shots: int = 0
    """Training videos of a class, drawn by the seed and repeated to the size of the whole set; 0: all."""
    frames: int = 8
    """Frames of a clip."""
    dense: bool = False
    """Take them from a window of 64 frames, not from the whole video."""
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    clips: int = 1
    """Clips that are averaged in the test; the source's best numbers are with 4 and 3 crops."""
    crops: Literal[1, 3] = 1
    shorter: int = 256
    """Pixels to which the shorter side of a frame is made smaller."""
    crop: Crop = field(default_factory=lambda: Crop(scale=(0.08, 1.0)))
    """Of training, the same for all frames; without --crop.flip where left and right are told apart."""
    grayscale: float = 0.2
    """Share of the training clips that lose their colours."""
    optim: OptimConfig = Text4Vis.optim
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=30, batch=256))

    def __call__(self, view: View, out: Path) -> list[Result]:
        """Return accuracies on the test videos, after training and without it (class names, frames averaged).

        Raises:
            UserError: classes do not fit, a test video does not decode, or the view has no text tower.
        """
        need_text(view, "a video classifier")
        check_prompts((self.prompt,))
        self._check()
        train = self._open(self.data, self.classes, training=True) if self.data is not None else None
        own = self.protocol == "zeroshot" or train is None
        test = self._open(self.test, self.test_classes) if own else self._open(self.test, self.classes, train)
        dist.start(view.device)
        named = text_matrix(view, test.names, self.prompt)
        untrained = self._method(view, test, named, MEAN, trainable=False)
        found = list(self._results(view, untrained, named, test, own, " untrained"))
        if train is None or self.data is None:
            return found
        method = self._train(view, train, untrained, out)
        return list(self._results(view, method, named if own else method.matrix, test, own, "")) + found

    def _check(self) -> None:
        if self.frames < 1 or self.clips < 1 or self.shorter < 1 or self.lda_videos < 1 or self.shots < 0:
            raise UserError(
                "videos need at least 1 frame, 1 clip, 1 pixel and no less than 0 shots: mend --frames, --clips, "
                "--shorter, --lda-videos or --shots."
            )
        if (self.data is None or self.protocol == "zeroshot") and (self.init != "text" or self.trainable):
            raise UserError(
                "classes that are not trained on have vectors by their names only: use --init text, not trained."
            )
        if self.data is None and self.classes is not None:
            raise UserError("--classes are those of --data, which is not given: name the test's by --test-classes.")
        if self.data is not None and self.protocol == "closed" and self.test_classes is not None:
            raise UserError(
                "test videos have the classes of --data: leave --test-classes away, or use --protocol zeroshot."
            )
        if self.data is None and self.shots:
            raise UserError(
                f"--shots {self.shots} are to be trained on, and there is nothing to draw them from: give --data."
            )

    def _open(
        self, where: Path, names: Path | None, like: NamedVideos | None = None, training: bool = False
    ) -> NamedVideos:
        """Return the videos at `where`, with the classes of `names`, those of `like`, or those that occur."""
        items = list_items(where, is_video, "video")
        for item in items:
            if not item.label:
                raise UserError(f"the video '{item.path}' has no label: put it into a folder of its class, or a table.")
        if like is not None:
            labels, spoken = like.videos.classes, like.names
            check_labels(items, labels, where, all_have_folders=False)
        else:
            occurring = sorted({item.label for item in items})
            listed = {name: (name,) for name in occurring} if names is None else read_classes(names)
            labels, spoken = tuple(listed), tuple(found[-1] for found in listed.values())
            check_labels(items, labels, where)
        if len(labels) < 2:
            raise UserError(f"'{where}' has a single class, '{labels[0]}': a classifier needs two or more.")
        clips = 1 if training else self.clips
        videos = Videos(tuple(items), labels, self.frames, training, clips, self.dense, self.shorter)
        return NamedVideos(videos, spoken)

    def _method(
        self, view: View, data: NamedVideos, matrix: Tensor, temporal: TemporalConfig, trainable: bool
    ) -> Text4Vis:
        config = Text4Vis.Config(
            weights=weights_hash(view.encoder),
            classes=tuple(self.prompt.replace("{}", words(name)) for name in data.names),
            init=self.init,
            trainable=trainable,
            frames=self.frames,
            dense=self.dense,
            temporal=temporal,
            crop=self.crop,
            grayscale=self.grayscale,
            shots=self.shots,
            shorter=self.shorter,
            lda_videos=self.lda_videos,
        )
        method = Text4Vis(config, ImageTower(view), matrix.to(view.device), view.logit_scale)
        method.init_weights(key(self.fit.seed, 0, "video"))
        return method.to(view.device)

    def _train(self, view: View, train: NamedVideos, untrained: Text4Vis, out: Path) -> Text4Vis:
        videos = train.videos.few(self.shots, self.fit.seed) if self.shots else train.videos
        matrix = self._matrix(view, replace(train, videos=videos), untrained)
        method = self._method(view, train, matrix, self.temporal, self.trainable)
        assert self.data is not None
        data = prepared_for(videos, self.data, videos.digest())
        trained = fit("video", lambda: method, method.config, self.optim, self.fit, data, out)
        assert isinstance(trained, Text4Vis)
        keep_encoder(view, trained.encoder, out)
        return trained

    def _matrix(self, view: View, train: NamedVideos, untrained: Text4Vis) -> Tensor:
        """Return the class matrix (C, E) that training starts from."""
        classes, width = len(train.names), untrained.matrix.shape[1]
        if self.init == "text":
            return text_matrix(view, train.names, self.prompt)
        if self.init == "orthogonal":
            return orthogonal(classes, width, self.fit.seed)
        if self.init == "normal":
            return normal(classes, width, self.fit.seed)
        videos = replace(train.videos.at_most(self.lda_videos, self.fit.seed), training=False, clips=1)
        seen = see(untrained, videos, view.batch_size, skip_broken=True)
        return discriminants(seen.vectors, seen.labels, classes)

    def _results(
        self, view: View, method: Text4Vis, matrix: Tensor, test: NamedVideos, halves: bool, after: str
    ) -> Iterator[Result]:
        seen, device = see(method, test.videos, view.batch_size, self.crops), method.logit_scale.device
        with torch.inference_mode():
            logits = method.classify(seen.vectors.to(device), matrix.to(device)).cpu()
        facts: dict[str, Any] = {
            "task": self.test.stem,
            "evaluator": "video",
            "feature_point": f"{view.feature_point}, projected, mean of {self.frames} frames",
            "data": test.videos.digest(),
            "note": f"{self.clips} clips x {self.crops} crops",
            "extra": {"seed": self.fit.seed, "prompt": self.prompt, "classes": len(test.names)},
        }
        yield from score(view, logits, seen.labels, after, facts)
        if halves and len(test.names) > 3:
            yield half_classes(view, logits, seen.labels, after, self.fit.seed, facts)


def text_matrix(view: View, names: tuple[str, ...], prompt: str) -> Tensor:
    """Return the unit vectors (C, E) of class names in one prompt."""
    return class_vectors(view, [words(name) for name in names], (prompt,))
