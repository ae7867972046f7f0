"""Builds the shards of `altsight_samples` from public packages; see samples/README.md."""
