"""`python -m lrd` is the `lrd` command."""

from lrd.cli.app import main

if __name__ == "__main__":
    main()
