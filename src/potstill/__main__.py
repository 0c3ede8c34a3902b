"""`python -m potstill` is `potstill`."""

from potstill.cli.app import main

main()
