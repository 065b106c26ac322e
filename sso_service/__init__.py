"""One-time login tokens for a web studio: issue, redeem once, and store only used tokens."""

__version__ = "0.1.0"
