"""Fuzzing. A target is a module with `SEEDS`, and a `check` that fails when a promise does not hold for some bytes."""
