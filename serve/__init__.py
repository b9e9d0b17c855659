"""An OpenAI-compatible server over the whole system, and a page to talk to it: python -m serve."""
