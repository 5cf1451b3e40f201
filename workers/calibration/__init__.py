"""What a block is calibrated on: texts, token sets, activations and their statistics."""
