"""Lets ``python -m examples.digits`` run the command line."""

from examples.digits.cli import main

if __name__ == "__main__":
    main()
