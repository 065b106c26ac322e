"""HTTP: what comes in is translated to a use case, and what comes out of it to an answer."""
