"""`python -m sspruner` is the `sspruner` command."""

from sspruner.cli.main import main

main()
