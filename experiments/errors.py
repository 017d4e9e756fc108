"""What ends a run with an exit code of its own; apart, so that the command line need not import the training."""


class RunFailed(RuntimeError):
    """The run cannot go on: its loss or gradient is not finite."""
