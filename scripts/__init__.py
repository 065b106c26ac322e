"""The scripts of this repository, and the programs that they run."""
