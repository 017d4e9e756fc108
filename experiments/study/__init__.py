"""A whole report in stages: which runs, what they cost, running them, and the records they leave."""
