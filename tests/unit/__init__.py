"""Tests of pure modules: no database, no process, no socket."""
