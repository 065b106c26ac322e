"""Tests with a cluster: three nodes of the service, two of PostgreSQL, and the loss of one of those."""
