"""The soak with hostile clients: logins at half load, first alone, then beside hostile connections of every kind."""
