"""Records on disk: validated, read from JSONL and shards, streamed in order, converted from other people's formats."""
