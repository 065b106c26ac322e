"""What only a cluster can show: three nodes of the service over two of PostgreSQL, and the loss of one of those."""
