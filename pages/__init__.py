"""The HTML pages, jinja2 templates and one style sheet: of an answer, of many, of a training run, of an evaluation."""
