"""From shards to batches: index, order, decoding, views, tokens, loader."""
