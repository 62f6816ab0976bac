"""What a model is given: weights, batches, text. Imports nothing of the rooms that look at graphs."""
