"""`python -m bench`: see measure.py."""

from bench.measure import command
from training import run_script

if __name__ == "__main__":
    run_script(command)
