"""The cache of files on local disk."""
