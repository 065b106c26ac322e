"""Whether the time of a refusal tells why: `scripts/timing`, or `python -m tests.timing` where everything is installed.

`dudect` is the statistical test, `cases` are the refusals that it is put to, and leaks that it has to find.
"""
