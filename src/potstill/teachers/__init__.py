"""Teachers that are no live model: caches on disk and servers."""
