"""What the benchmarks share: when they refuse, what they print, the pair, the text, a side in its own process."""
