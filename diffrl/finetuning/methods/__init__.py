"""Fine-tuning methods, one file each: loss, surrogate, recipe and refusals together."""
