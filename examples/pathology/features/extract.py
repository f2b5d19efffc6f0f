"""The command extract: a folder of slides to feature files."""

from dataclasses import replace

from examples.pathology.features import dispatch
from examples.pathology.features.ledger import ExtractSummary
from examples.pathology.settings.extract import ExtractConfig
from examples.pathology.slides.pixelsizes import mpp_of_slides
from examples.pathology.slides.slide import find_slides


def run_extract(config: ExtractConfig) -> ExtractSummary:
    """Turn a folder of slides into feature files, tile pictures and a ledger.

    Writes ``<out>/<stem>.h5`` (sub-folders kept), ``<out>/thumbnails/<stem>.jpg`` and
    ``<out>/ledger.csv``. Slides that an earlier run finished with the same parameters are left
    alone; with other parameters they are redone, and the log says which changed. A slide that
    cannot be used gets a row in the ledger and never stops the run.

    Args:
        config: Which slides, and how.

    Returns:
        What became of every slide; its `exit_code` is 1 if some failed.

    Raises:
        UserError: If the call is wrong: no slides, unusable weights, a broken table.
    """
    files = find_slides(config.slides, skip=config.out)
    if config.slide_table is not None:
        names = {file.stem: file.name for file in files}
        known = mpp_of_slides(config.slide_table, names, config.filename_column, names)
        files = [replace(file, table_mpp=known.get(file.stem)) for file in files]
    return dispatch.run(files, config)
