"""Accuracy tables, each reproduced by one command: see README.md."""
