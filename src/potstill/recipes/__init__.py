"""One file per published system: values only."""
