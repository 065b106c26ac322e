"""The benchmark: this service, the framework alone (the ceiling), and a conventional service, side by side.

`scripts/bench` sets up and runs it. Everything is measured in one run on one machine. The two measurements behind a
ratio are taken shortly after one another, because only such measurements are comparable.
"""
