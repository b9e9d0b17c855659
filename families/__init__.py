"""Other language models and painters, each in one file, and the table that says which class reads which config.json."""
