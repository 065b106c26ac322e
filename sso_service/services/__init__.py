"""The use cases. They depend on neither HTTP nor the command line."""
