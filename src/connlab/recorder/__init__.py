"""What happens in the application's pool, in PgBouncer and in PostgreSQL at the same moments.

Example:
    >>> from connlab import Postgres, Recorder
    >>> with Postgres.start() as pg, Recorder(pg) as rec:
    ...     rec.mark("nothing happens")
    >>> sorted(rec.frame().columns)
    ['kind', 'metric', 'seconds', 'source', 'value']
"""

from connlab.recorder.recording import Mark as Mark
from connlab.recorder.recording import Recorder as Recorder
from connlab.recorder.series import Gap as Gap
from connlab.recorder.series import Series as Series

__all__ = ("Gap", "Mark", "Recorder", "Series")
