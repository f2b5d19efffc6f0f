"""Lets ``python -m examples.pathology`` run the command line."""

from examples.pathology.cli import main

if __name__ == "__main__":
    main()
