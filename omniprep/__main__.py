"""`python -m omniprep`: the command line."""

from omniprep.cli import main

if __name__ == "__main__":
    main()
