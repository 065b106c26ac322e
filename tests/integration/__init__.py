"""Tests of the application in this process, with SQLite and PostgreSQL."""
