"""The commands of `altsight.cli`: each parses its own options with tyro and calls the Python interface."""
