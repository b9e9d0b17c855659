"""The HTML pages: of an answer, and of a training run."""
