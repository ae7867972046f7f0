"""Prompt templates: from a file, or a named set of the libraries that publish them (specification D1.3)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from altsight.core.errors import UserError, did_you_mean

IMAGENET = ("imagenet", "imagenet7")
"""OpenAI's 80 templates for ImageNet, and the seven that do as well at an eleventh of the cost; from open_clip."""
BENCHMARK_FILE = "datasets/en_zeroshot_classification_templates.json"


def templates(name: str) -> tuple[str, ...]:
    """Return prompts with one `{}` for the class name.

    Args:
        name: "imagenet" or "imagenet7" (with open_clip); a data set of CLIP's paper as CLIP_benchmark names it, such
            as "cifar10" or "fgvc_aircraft"; or a text file with one template a line, whose place for the name is `{}`
            or `{c}`.

    Raises:
        UserError: there is no such set or file, a library is missing, or a template has not one place for the name.
    """
    if Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"the templates '{name}' are no UTF-8 text: save them as UTF-8.") from None
        lines = (line.strip() for line in text.splitlines())
        return check_prompts(tuple(line.replace("{c}", "{}") for line in lines if line), f"'{name}': ")
    if name in IMAGENET:
        return _of_open_clip(name)
    sets = _of_benchmark(name)
    if name not in sets:
        raise UserError(f"there is no file or set of templates '{name}'.{did_you_mean(name, (*IMAGENET, *sets))}")
    return tuple(template.replace("{c}", "{}") for template in sets[name])


def check_prompts(prompts: tuple[str, ...], where: str = "") -> tuple[str, ...]:
    """Return `prompts`; `where` begins the message.

    Raises:
        UserError: there is none, or one has not exactly one `{}`.
    """
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(
                f"{where}the prompt '{prompt}' needs one {{}} where the class name goes, as in 'a photo of a {{}}'."
            )
    if not prompts:
        raise UserError(f"{where}zero-shot classification needs at least one prompt, such as 'a photo of a {{}}'.")
    return prompts


def _of_open_clip(name: str) -> tuple[str, ...]:
    try:
        import open_clip
    except ModuleNotFoundError:
        raise UserError(f"the templates '{name}' need open_clip: `pip install 'altsight[openclip]'`.") from None
    found = open_clip.OPENAI_IMAGENET_TEMPLATES if name == "imagenet" else open_clip.SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in found)


def _of_benchmark(name: str) -> dict[str, list[str]]:
    spec = find_spec("clip_benchmark")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"'{name}' is no file, and the named sets of templates need CLIP_benchmark: `pip install clip-benchmark`."
        )
    # The file is read where it lies: importing the package would import all that it can evaluate.
    text = (Path(spec.submodule_search_locations[0]) / BENCHMARK_FILE).read_text(encoding="utf-8")
    found: dict[str, list[str]] = json.loads(text)
    return found
