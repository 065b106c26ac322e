"""The HTTP server: connections, sockets, workers. The only importer of uvicorn."""
