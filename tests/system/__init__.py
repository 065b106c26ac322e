"""Tests of processes: the service, proxies, browsers, a cluster, and the proof."""
