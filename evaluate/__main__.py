"""`python -m evaluate`: see report.py."""

import training
from evaluate.report import main

if __name__ == "__main__":
    training.run_script(main)
