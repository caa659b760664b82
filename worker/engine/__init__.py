"""A model on a device, and the bytes of an image."""
