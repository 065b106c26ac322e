"""Fuzzing. A target is a module with `SEEDS`, and with a `check` that fails if some bytes break a promise."""
