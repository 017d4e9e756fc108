"""What the book in docs/book needs besides the code that it shows: its exercises, tables and pictures."""
