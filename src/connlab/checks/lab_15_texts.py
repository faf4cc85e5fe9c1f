"""Where to look next: what the cards of lab 15 say about mistakes."""

from __future__ import annotations

READ = "Read the error, from its end, and the line that it came from."
AWAIT = (
    "A coroutine does nothing before it is awaited, and has no result before that: in front of a call an `await` is "
    "missing."
)

# --- orphans ---

LIST = "Return a list of whole numbers: the `pid` of each backend, as pg_stat_activity has it."
OTHERS = (
    "An administrator's query is no orphan, nor is that of the session which asks pg_stat_activity: such sessions come "
    "past PgBouncer, so PgBouncer cannot know them. What in pg_stat_activity tells them from the service's?"
)
IDLE = "An orphan is a query that still runs. What does pg_stat_activity say of a session that runs none?"
HEALTHY = (
    "Somebody waits for the answers of these. PostgreSQL cannot tell, and how long they have run does not either: one "
    "is older than the orphans, one younger. PgBouncer has dropped the server connections of clients that have gone: "
    "which list of its console has those that it still has, and which column of it can be compared with `pid`?"
)
MISSED = (
    "A backend works for nobody when it is active and PgBouncer has no connection to it any more. Look at both lists, "
    "one below the other: which backends are in one alone? The service's role is `app`."
)

# --- a caller that gives up ---

BACK = (
    "Something still waits when the caller's patience is over. Who ends the query when the time has come? And what if "
    "that comes a moment too early, when the query has not begun yet: a cancel that finds nothing to cancel does "
    "nothing, and says nothing."
)
NO_LIMIT = (
    "Requests waited for a connection, without a limit of their own. The caller's patience counts from when it asks: "
    "waiting for a connection is part of it (`pool.connection(timeout=…)`)."
)
QUEUE = (
    "At one moment {} of the clients stood in PgBouncer's queue. A cancel ends a query that runs; PgBouncer does "
    "nothing with one for a client that is still waiting for a server connection. Where else can requests wait, so "
    "that your own code can send them home? PgBouncer's pool has room for two."
)
TWICE = (
    "A caller that waits for a connection first has less time left for its query, not the whole patience once more. "
    "Note when it must be back as soon as it asks, and give the query what is left."
)
STAYED = (
    "A setting of yours has stayed on a server connection, and meets other clients: PgBouncer gives the connection to "
    "whoever comes next. `SET LOCAL`, or `set_config(…, true)`, ends with the transaction."
)
RETURNS = "A caller that got no row must hear of it: raise TimeoutError."
BROKEN = (
    "A cancelled query leaves its transaction failed, and the next request got the connection like that. End the "
    "transaction before the connection goes back: `with pool.connection()` does so."
)
OTHER_ERROR = {
    "PoolTimeout": (
        "`PoolTimeout` is what psycopg_pool calls it when no connection comes back in time; it is no TimeoutError of "
        "Python's. To the caller it is the same as a query that takes too long: raise TimeoutError in its place."
    ),
    "QueryCanceled": (
        "The query was cancelled, and the caller gets the database's word for it. Say it in the caller's words: raise "
        "TimeoutError in its place."
    ),
    "OperationalError": (
        "The connection is lost, and the caller gets the driver's word for it. To give up, no connection need be lost: "
        "psycopg can cancel a query, and the connection stays."
    ),
    "InFailedSqlTransaction": BROKEN,
}
CLOSED = (
    "More queries run than PgBouncer has connections. Somebody closes a connection while its query runs: PgBouncer "
    "then closes the server's too, and opens another one for the next client, but the backend does not notice before "
    "it has something to send. End the query before you give the connection up."
)
LEFT = (
    "The callers have gone, and the server works on for them. Giving up a wait, such as that of "
    "`future.result(timeout=…)`, ends the wait and not the query. Who tells the server? psycopg's connections have a "
    "method for it, which another thread may call."
)
ROW = "Return the row as `fetchone()` gives it."
OPEN = (
    "A request has got its row and left its transaction open. PgBouncer keeps the server connection for it, and the "
    "locks stay. End the transaction before the connection goes back: `with pool.connection()` does so."
)
LEAK = (
    "Connections have not come back, and later requests give up without having asked anything. Which line gives the "
    "connection back when the query was cancelled?"
)
PREPARED = (
    "psycopg has prepared the query on one server connection, and met another one later. This PgBouncer knows nothing "
    "of prepared statements: give the pool `kwargs=CONNECT`, with which psycopg prepares none."
)
STRAY = (
    "A request was cut short by the cancel of an earlier one that had the same connection, or by a limit of yours that "
    "is shorter than the caller's patience. What waits to cancel a query must be called off when the query is done, "
    "and be over, before the connection goes back."
)

# --- a task that is cancelled ---

BLOCKS = (
    "A task can be cancelled only where it awaits. A call that blocks, such as one of psycopg's ordinary connections, "
    "holds up the loop with all its tasks, and nobody's patience ends meanwhile."
)
SWALLOWED = (
    "A task that is cancelled must end so: who cancels it waits for that, and turns it into TimeoutError. Let "
    "`asyncio.CancelledError` go on, after whatever has to be put in order."
)
LEFT_BY_TASK = (
    "The tasks are cancelled, and the server works on for them. A cancelled task does not end a thread that it waits "
    "for, nor a task that is shielded. psycopg's asynchronous connections end the query themselves when the task that "
    "awaits it is cancelled."
)

# --- killed clients ---

UNPROTECTED = (
    "A client that was killed cancels nothing. PgBouncer has closed the connection, and the backend would see that, if "
    "it looked: it does not while it works. A new session of the role `app` still has "
    "`client_connection_check_interval` = 0 and `statement_timeout` = 0. What holds for new sessions is set for a "
    "role, a database or the whole server; a `SET` ends with the session that said it."
)
UNREAD = (
    "`{}` = {} is written, but not yet read: `ALTER SYSTEM` writes a file, which the server reads when it is told to: "
    "`select pg_reload_conf()`."
)
CUT = (
    "Somebody waited for this query when `protect` was called. Whoever needs the new settings gets them with a new "
    "connection: which command of PgBouncer's console opens one as soon as nobody uses the old one?"
)
SHUT = "What `protect` sets must let the service go on: its clients connect to PgBouncer, and ask."
OLD = (
    "The setting holds for sessions that begin now. This backend is an older one, from PgBouncer's pool. Which command "
    "of PgBouncer's console has it open its server connections anew?"
)
TOO_LATE = (
    "A new session of the role `app` has `client_connection_check_interval` = {} and `statement_timeout` = {}: that is "
    "too late for a caller who leaves after less than half a second."
)
IMPATIENT = (
    "The server has ended a query whose caller was still waiting. What it allows must be more than the caller's "
    "patience, 0.3 seconds; or let it look whether the client is still there, instead of at the time."
)
REPORT = (
    "The report may take long, and somebody waits for it. A limit on the time belongs to those whose callers have one: "
    "a role can have settings of its own."
)

# --- trying again ---

AGAIN = (
    "The first attempt raised TimeoutError, which may be over in a moment. Call `attempt()` again, and return what "
    "it returns."
)
PAUSE = (
    "A server that was too slow just now is so a millisecond later. Wait a little between attempts, longer each time, "
    "and not all callers for as long: `random.uniform`."
)
HOPELESS = (
    "A query that is wrong is wrong each time: another attempt costs the server work and the caller time. Try again "
    "after a TimeoutError alone."
)
BUDGET = (
    "One request made up to {} attempts. When all give up, all try again, and a slow server gets that many times the "
    "work. The service needs a budget for all of them: count requests and retries in `app`, and do not try again when "
    "the retries are 3 and a fifth of the requests."
)
ENDLESS = (
    "A request has three attempts; then its caller must hear that it got nothing. Let the last attempt's TimeoutError "
    "go on to the caller."
)
SPENT = (
    "A limit for each request is not enough: when all give up, all try again, and a slow server gets three times the "
    "work. Count requests and retries in `app`: before a retry there must be fewer than 3 + requests // 5. A request "
    "counts once, however many attempts it makes."
)
GROWS = (
    "The retries were spent, and 20 requests have come since then: there are 4 retries more. Count each request when "
    "it comes, also one that is answered at once."
)
IN_THE_END = "When the last attempt has failed, let its TimeoutError go on to the caller."
