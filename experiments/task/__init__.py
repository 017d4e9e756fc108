"""The task as tokens: series, split, scale, text and back; the model that reads it."""
