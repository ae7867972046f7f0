"""The like-for-like study: several methods, one budget, one report."""
