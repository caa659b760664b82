"""LoRAs and models that jobs may name."""
