"""What an arm is shown of interleaved documents: the whole of each, or one image with its sentence.

Both are read in the same order of documents, so arms that learn from pairs and arms that learn from documents see the
same documents at the same positions.
"""

from __future__ import annotations

from dataclasses import replace

from altsight.core.errors import UserError
from altsight.data.mixture import Mixture
from altsight.data.prepared import Prepared
from altsight.data.sources import Interleaves, Source
from altsight.data.totals import digest
from altsight.study.plan import Plan


def data_of(plan: Plan, arm: str, prepared: Prepared) -> Prepared:
    """Return the data as `arm` is shown them.

    Raises:
        UserError: the arm is to see pairs of documents, and the data are no documents.
    """
    if arm not in plan.pairs:
        return prepared
    if not _has_documents(prepared.source):
        raise UserError(
            f"pairs: '{prepared.directory}' holds no interleaved documents of which {arm} could be shown pairs: take "
            "it out of `pairs`."
        )
    return replace(prepared, source=_paired(prepared.source), digest=digest([], prepared.hash(), "pairs"))


def _has_documents(source: Source) -> bool:
    return isinstance(source, Interleaves) or (isinstance(source, Mixture) and any(map(_has_documents, source.sources)))


def _paired(source: Source) -> Source:
    if isinstance(source, Interleaves):
        return replace(source, as_pairs=True)
    return replace(source, sources=tuple(map(_paired, source.sources))) if isinstance(source, Mixture) else source
