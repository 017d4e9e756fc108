"""Training of one run: the maths of an update, a resumable cell, several processes as one."""
