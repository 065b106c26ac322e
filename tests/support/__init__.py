"""Shared parts of the tests, one subject per module."""
