"""The HTTP server of our own models (extra `serve`)."""
