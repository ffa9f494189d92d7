"""How a run ends, for scripts and launchers: the one table of exit codes."""

FINISHED = 0
FAILED = 1
"""An unexpected error, with a traceback."""
USAGE = 2
"""Bad usage, configuration or data."""
DIVERGED = 3
INTERRUPTED = 130
"""By Ctrl-C before there was anything to save."""
STOPPED = 75
"""On a signal, after saving: run again with ``--resume auto``."""
LOST = 76
"""A rank was killed, or its node is gone: run again with ``--resume auto``."""
