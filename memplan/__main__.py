"""`python -m memplan`: the `memplan` command."""

from memplan.cli.app import main

main()
