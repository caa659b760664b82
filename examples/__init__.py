"""Worked examples that ship with the project."""
