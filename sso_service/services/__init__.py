"""The use cases. They know the domain, and neither HTTP nor the command line."""
