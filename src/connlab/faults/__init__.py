"""Faults that a lesson switches on, as context managers: after the ``with`` block the world is as it was.

Each yields a ``Fault``, which prints as what it did, and restores also after an exception, an interrupt, or the end of
the server meanwhile. What each one does is a few lines of psycopg, which its docstring shows.

Example:
    >>> from connlab import faults
    >>> with faults.leak(pool, 2) as fault:
    ...     print(fault)
    leaked 2 connections (in_transaction) since 14:03:07.512, server processes 4711, 4712
"""

from connlab.faults.fault import Fault as Fault
from connlab.faults.leaks import leak as leak
from connlab.faults.servers import frozen as frozen
from connlab.faults.servers import killed as killed
from connlab.faults.servers import restarting as restarting
from connlab.faults.sessions import hold_row_lock as hold_row_lock
from connlab.faults.sessions import idle_in_transaction as idle_in_transaction
from connlab.faults.sessions import slow_query as slow_query
from connlab.faults.slots import saturate as saturate

__all__ = (
    "Fault",
    "frozen",
    "hold_row_lock",
    "idle_in_transaction",
    "killed",
    "leak",
    "restarting",
    "saturate",
    "slow_query",
)
