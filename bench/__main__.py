"""`python -m bench`: see measure.py."""

from bench.measure import command
from training import main

if __name__ == "__main__":
    main(command)
