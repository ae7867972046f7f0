"""Encoders, text towers, decoders: modules without a loss."""
