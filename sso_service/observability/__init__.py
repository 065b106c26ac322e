"""Audit events, log lines, metrics and traces, for operators."""
