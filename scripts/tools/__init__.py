"""The programs behind `scripts/bench`, `prove`, `fuzz`, `timing` and `audit`."""
