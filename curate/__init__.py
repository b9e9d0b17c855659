"""The data engine: web pages, seed requests, videos and public sets become the records of data.py."""
