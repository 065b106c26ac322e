"""The pages of a Studio, for installations without one of their own."""
