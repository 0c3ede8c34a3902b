"""Teachers that are not loaded models: caches on disk, and servers."""
