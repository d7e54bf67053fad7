"""A page to look at: what one run did, or several beside one another, from the files in their output directories.

runs.py reads, charts.py decides what to draw, plots.py draws it with matplotlib, and page.py writes HTML. Nothing here
changes a run. matplotlib is optional, so only plots.py imports it, and training imports nothing of it.
"""

import importlib.util
from pathlib import Path

from config.errors import OptionError, install
from runtime.files import replace_file

PAGE = "report.html"


def require_matplotlib(option: str) -> None:
    """Refuse `option` if matplotlib is not installed. Raises OptionError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(f"{option}: matplotlib is not installed here\n{install('matplotlib')}")


def write_report(paths: list[Path], page: Path, png: bool = False) -> list[Path]:
    """Write `page` about the runs in the directories `paths`, and with `png` a picture of its charts next to it.

    Returns the written files. Raises OptionError for a directory without a run, without matplotlib, and for a page that
    cannot be written.
    """
    require_matplotlib(PAGE)
    from metrics.report.charts import make_charts  # needs matplotlib
    from metrics.report.page import render
    from metrics.report.plots import to_png
    from metrics.report.runs import read_runs

    runs = read_runs(paths)
    content = {page: render(runs).encode()}
    if png:
        content[page.with_suffix(".png")] = to_png(make_charts(runs), ", ".join(run.name for run in runs))
    for path, data in content.items():
        try:
            replace_file(path, data)
        except OSError as error:
            raise OptionError(f"{path}: it cannot be written: {error.strerror}; pass another --output") from error
    return list(content)
