"""`python -m blockdiff`: the command line, where its script is not on the path."""

from blockdiff.cli import main

if __name__ == "__main__":
    main()
