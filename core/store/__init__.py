"""Object storage: a local directory, or S3."""
