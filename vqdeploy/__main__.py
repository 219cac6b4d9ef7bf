"""`python -m vqdeploy`."""

from vqdeploy.cli import main

main()
