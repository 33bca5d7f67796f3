"""`python -m tersor.cli` is `tersor`."""

from tersor.cli import main

main()
