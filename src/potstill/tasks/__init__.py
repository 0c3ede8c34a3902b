"""One folder per structured task."""
