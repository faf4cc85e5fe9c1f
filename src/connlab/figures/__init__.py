"""The course's figures. Each has a title, axes with units, a sentence on what to look at, and alternative text.

They know nothing of pyplot and leave a notebook's matplotlib settings alone. A cell whose last line is such a call
shows the figure; ``.alt`` is its text, ``.save(path)`` writes it.
"""

from connlab.figures.compared import bars as bars
from connlab.figures.compared import curves as curves
from connlab.figures.measured import knee as knee
from connlab.figures.measured import latencies as latencies
from connlab.figures.measured import sweep as sweep
from connlab.figures.picture import Picture as Picture
from connlab.figures.recorded import timeline as timeline
from connlab.figures.side_by_side import spans as spans
from connlab.figures.traces import errors as errors
from connlab.figures.traces import swimlanes as swimlanes

__all__ = ("Picture", "bars", "curves", "errors", "knee", "latencies", "spans", "sweep", "swimlanes", "timeline")
