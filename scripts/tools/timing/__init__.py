"""Test whether the time of a refusal reveals its reason: `scripts/timing`, or `python -m scripts.tools.timing`.

`dudect` is the statistical test. `cases` contains the refusals to test, and planted leaks that the test must find.
"""
