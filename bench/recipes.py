"""Count what one sample of every recipe and every arm of a packaged study costs: `python -m bench.recipes [NAME ...]`.

The result is altsight/recipes/costs.toml, which `altsight recipes` reads. With names of recipes, studies, arms
(study_cc3m.mae) or methods only these are counted anew.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from altsight.core.errors import UserError
from altsight.recipes.cost import FILE, Cost, measure, stored
from altsight.recipes.library import STUDIES, VOCABULARIES, data_sets, recipes
from altsight.train.run import Run

HEAD = """# What one sample costs: written by `python -m bench.recipes`, read by `altsight recipes`.
# FLOPs forward and backward; parameters, and those that are trained; bytes of activations (altsight/recipes/cost.py).
"""


def wanted() -> Iterator[tuple[str, str, str, Callable[[], Run[Any]], dict[str, Any]]]:
    """Yield (group, name, method, what makes the run, the other arguments of `measure`)."""
    for recipe in recipes().values():
        data = recipe.data_set
        about = {"kind": data.kind, "vocabulary": recipe.vocabulary or 8192, "classes": data.classes or 22}
        yield "recipes", recipe.name, recipe.method, recipe.run, about
    for study in STUDIES.values():
        plan = study.plan
        vocabulary = VOCABULARIES[study.tokenizer] if plan.source is None else plan.source.vocab_size
        kind = data_sets()[study.data].kind if study.data else "pairs"
        for arm in plan.arms:
            shown = {"kind": "pairs" if arm in plan.pairs else kind, "vocabulary": vocabulary}
            yield study.name, arm, plan.method_of(arm), partial(plan.run, arm, 0, plan.train.batch), shown


def main(names: list[str]) -> None:
    """Count, and write the file after every entry."""
    torch.set_num_threads(1)
    counted: dict[str, Cost] = {}
    for group, name, method, make, about in wanted():
        if names and not {group, name, method, f"{group}.{name}"} & set(names):
            continue
        start = time.perf_counter()
        try:
            run = make()
            same = str([run.name, run.method, run.encoder, run.data.crop, run.optim.name, about])
            cost = counted.get(same) or measure(run, **about)
        except (UserError, RuntimeError) as error:
            print(f"{group} {name}: {error}", flush=True)
            continue
        counted[same] = cost
        # A model is part of cycles, and few objects: left to itself the collector comes too late for gigabytes.
        gc.collect()
        keep(group, name, cost)
        print(f"{group} {name}: {cost.flops:.3g} FLOPs ({time.perf_counter() - start:.0f} s)", flush=True)


def keep(group: str, name: str, cost: Cost) -> None:
    """Put one entry into costs.toml, and take out what is no recipe or arm any more."""
    stored.cache_clear()
    costs = {(g, n): old for g, olds in stored().items() for n, old in olds.items()} | {(group, name): cost}
    known = {(g, n) for g, n, *_ in wanted()}
    lines = [HEAD]
    for group in sorted({g for g, _ in costs}):
        entries = sorted((n, c) for (g, n), c in costs.items() if g == group and (g, n) in known)
        lines += [f"[{group}]", *(f"{n} = {_table(c)}" for n, c in entries), ""]
    part = FILE.with_suffix(".part")
    part.write_text("\n".join(lines), encoding="utf-8")
    part.replace(FILE)


def _table(cost: Cost) -> str:
    return "{ " + ", ".join(f"{name} = {value!r}" for name, value in asdict(cost).items()) + " }"


if __name__ == "__main__":
    main(sys.argv[1:])
