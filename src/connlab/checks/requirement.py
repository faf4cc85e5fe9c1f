"""What lab 14 requires, in numbers, and what its checks say where it is not met."""

from __future__ import annotations

from connlab.checks.requests import HANGS

# The requirement, in seconds: what each may take at most.
POOL, QUEUE, LOCK, STATEMENT, PAUSE, TRANSACTION = 0.4, 0.8, 0.3, 0.4, 0.4, 0.8
CALLER = 1.9
CONNECT, SERVER_CONNECT, AGAIN = 3.0, 2.0, 1.5
# What is ordinary, and must not be ended.
PATIENT, A_STATEMENT, A_TRANSACTION, BACKUP = 0.08, 0.15, 0.4, 0.75
SLACK = 0.3
"""Seconds that everything may take longer, for a busy machine."""
THIRD = 0.33
"""Seconds between two looks of PgBouncer's at its clocks: what a limit of it may be exceeded by."""
GIVE_UP = HANGS
"""Seconds after which a check waits no longer for a limit."""
CONNECTIONS = 8
"""Of the service's pool."""
CROWD = 24
HELD = POOL + SLACK
"""Seconds that requests get, in the check of the pool, to be turned away."""
SETTLES = 1.0
"""Seconds that a pool has to open its connections, or to replace them."""
SOON = 0.25
"""Seconds that requests go on which a limit of a tenth of a second ends."""
IN_THE_WAY = 0.6
"""Seconds of the long transaction that is in the way of the migration, from when that first asks for its lock."""
NEVER_ASKS = 3.0
"""Seconds after which it ends all the same."""
MOST_STOOD = 0.6
MARGIN = f"{SLACK:g} s more are the machine's"

READ = "Read the error, from its end."
NOT_SET = (
    "Its limit is missing, off or too long; a number without a unit is milliseconds. What `set` says ends with the "
    "session that has run your SQL. "
    "`alter role … set` and `alter database … set` hold for sessions that begin later: "
    "https://www.postgresql.org/docs/current/sql-alterrole.html"
)
LATE = (
    "It was ended, later than the requirement allows. A number without a unit is milliseconds: "
    "https://www.postgresql.org/docs/current/config-setting.html"
)
TIGHT = (
    "That is ordinary work, which the requirement lets through. Which of your limits has this SQLSTATE, and in which "
    "unit does it stand? A number without a unit is milliseconds."
)
OTHER = (
    "Another limit was faster: this one is missing, off or too long; a number without a unit is milliseconds. Two "
    "that watch the same thing go off in the order of their lengths: the narrower one must be the shorter one, or it "
    "never does."
)
OPTIONS = (
    "PgBouncer refuses your connections: `unsupported startup parameter`, says its log. `options` of a connection to "
    "PgBouncer would have to hold on whichever server connection it gets. What must hold for the role belongs into "
    "`server_settings`."
)
LEAKS = (
    "PgBouncer gives a server connection to the next client as it is: what `set` has changed there holds for whoever "
    "comes next, and is missing on all other server connections. What holds for every session belongs to the role "
    "(task 1); what holds for one transaction is `set local`, inside it."
)
MAPPING = (
    "Look at the classes in https://www.psycopg.org/psycopg3/docs/api/errors.html#sqlstate-exceptions: the first "
    "`except` that fits is taken, `QueryCanceled` and `LockNotAvailable` are kinds of `OperationalError`, and the two "
    "that end a transaction by ending its session are kinds of `InternalError`."
)
WAITS = (
    "Nobody answers, so nobody may wait for it: neither `start` (a service that cannot start without its database does "
    "not come back by itself) nor a request that finds no connection."
)
CONVOY = (
    "A statement that waits for a strong lock stands in a queue, and everybody who comes after it stands behind it. So "
    "it must not wait for long: give up, let the others through, and try again."
)
FORM = "`handle` returns a pair: a status as a whole number, and with 200 what `work` has returned."
BUSY = "These requests are ordinary: eight connections do them easily. Which of your limits is too short for that?"
STATUSES = {
    "slow": ("a request that is ended by `statement_timeout` (57014)", 504),
    "idle": ("a request that is ended by `idle_in_transaction_session_timeout` (25P03)", 504),
    "long": ("a request that is ended by `transaction_timeout` (25P04)", 504),
    "locked": ("a request that is ended by `lock_timeout` (55P03)", 503),
    "lost": ("a request whose connection is lost (57P01)", 503),
}
