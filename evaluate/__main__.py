"""`python -m evaluate sketchbook`: see report.py; any other first word: see its module in COMMANDS."""

import importlib
import sys

import training

# The first word of a command line; any other belongs to the exam.
COMMANDS = {
    "generate": "evaluate.generate",
    "judge": "evaluate.judging",
    "report": "evaluate.figures",
    "pairs": "evaluate.pairs",
    "vote": "evaluate.vote",
    "trust": "evaluate.trust",
    "cost": "evaluate.cost",
}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        importlib.import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])
    else:
        importlib.import_module("evaluate.report").main()


if __name__ == "__main__":
    training.run_script(main)
