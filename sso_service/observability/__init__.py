"""What operators see: audit events, log lines, metrics and traces."""
