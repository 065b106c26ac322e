"""A test whether the time of a refusal shows its reason: `scripts/timing`.

Where everything is installed, it is `python -m scripts.tools.timing`.

`dudect` is the statistical test, `cases` are the refusals that it is put to, and leaks that it has to find.
"""
