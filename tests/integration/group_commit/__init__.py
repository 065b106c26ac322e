"""Group commit: operations of many requests that share a transaction."""
