"""`python -m tiedjax`."""

from tiedjax.cli import command

command()
