"""LoRA files: read, resolved against a model, fused into its weights."""
