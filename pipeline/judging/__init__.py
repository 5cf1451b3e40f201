"""What a compressed model is worth beside others: bounds for publication, measuring again, side by side."""
