"""What the benchmarks share: command line and JSON document, models, text, steps, and child processes."""
