"""Data cards that ship with the project."""
