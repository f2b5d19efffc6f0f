"""Log lines of a command: on stderr, past any progress bar, our own and others' warnings."""

import logging
import sys

OURS = ("examples", "mtbalance")  # packages whose log lines a user wants to see


def set_up_logging(*, verbose: bool = False) -> None:
    """Send log lines to stderr, past any progress bar."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _ProgressHandler):
            root.removeHandler(handler)
    handler = _ProgressHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_ours_or_warning)  # Dask gives its own loggers a lower level than the root's
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if verbose else logging.INFO
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def _ours_or_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in OURS


class _ProgressHandler(logging.Handler):
    """Writes a line without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
