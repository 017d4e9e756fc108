"""The verbs of the command line: their flags, and a thin function for each."""
