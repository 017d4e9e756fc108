"""The predator-prey series: the data set, LLMTIME text, splits by system and token windows."""
