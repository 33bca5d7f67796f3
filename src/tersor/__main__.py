"""`python -m tersor` is `tersor`."""

from tersor.cli import main

main()
