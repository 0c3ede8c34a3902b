"""An HTTP server for one model (extra `serve`)."""
