"""The ``fuseline`` command."""
