"""Lets ``python -m examples.toy`` run the command line."""

from examples.toy.cli import main

if __name__ == "__main__":
    main()
