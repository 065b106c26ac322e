"""One-time login tokens for a web studio: issue, redeem once, and keep nothing but what was used."""
