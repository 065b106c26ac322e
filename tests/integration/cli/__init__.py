"""The command line: output and refusals of each command, on both databases."""
