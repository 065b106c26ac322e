"""The benchmark: this service beside what the framework alone can do, and beside how it is usually built.

`scripts/bench` sets up what it needs and runs it. Everything happens in one run on one machine, and every ratio is of
two measurements that were taken shortly after one another, since only those are worth comparing.
"""
