"""Where the embedded sample data lie: sources that begin with `samples:`."""

from __future__ import annotations

from altsight.core.errors import UserError, did_you_mean

SAMPLES = "samples:"
"""Prefix of sources in the embedded sample data: `samples:clipart/train`."""


def locate(source: str) -> str:
    """Return the path of a source: `samples:NAME/SPLIT` and `samples:documents` are embedded sample data.

    Raises:
        UserError: there are no such sample data, or they are not installed.
    """
    if not source.startswith(SAMPLES):
        return source
    try:
        import altsight_samples
    except ModuleNotFoundError:
        raise UserError(f"'{source}' needs the embedded sample data: `pip install altsight-samples`.") from None
    check_samples(source)
    name, _, split = source.removeprefix(SAMPLES).partition("/")
    return str(altsight_samples.path(name, split) if split else altsight_samples.documents())


def check_samples(source: str) -> None:
    """Raise UserError if `source` asks for sample data that there are not."""
    if not source.startswith(SAMPLES):
        return
    import altsight_samples

    known = [f"{SAMPLES}{name}/{split}" for name in altsight_samples.NAMES for split in altsight_samples.SPLITS]
    known.append(f"{SAMPLES}documents")
    if source not in known:
        raise UserError(f"there is no sample data '{source}'.{did_you_mean(source, known)}")
