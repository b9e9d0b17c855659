"""`python -m sketchbook`: see dialogues.py."""

from sketchbook.dialogues import main

if __name__ == "__main__":
    main()
