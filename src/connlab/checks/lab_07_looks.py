"""What the cards of lab 07 say where an expectation is not met: where to look next."""

from __future__ import annotations

NIGHTLY = 7
"""The number of the advisory lock that every program takes for the nightly job."""
BAD = "(BAD, "
"""How the server's words show a row of an import that has failed."""
ONE_DAY = "closing_one_day"
"""The index by which a check holds up who inserts a day."""

READ = "Read the error, from its end, and the line that it came from."
STATEMENT = (
    "A prepared statement belongs to the server connection on which it was made, under a name that the client gave it. "
    "Here the next transaction found another server connection, or another client's statement of that name. Who "
    "prepares? Besides what you write, psycopg prepares by itself what it executes often: its documentation says under "
    "prepared statements when, and how it is told not to. What your `start` makes decides this for all functions."
)
RETRIED = (
    "The server has refused statements, and your code has tried again. Each such call costs the server an error, and "
    "inside a transaction nothing can be tried again. How is nothing prepared in the first place?"
)
STALE = "A rate changed in the table, and your function still returned the old one. Ask the server in each call."
NO_PARAMETERS = "`SET` takes no parameters. The function `set_config(name, value, true)` does, and is as local."
QUOTED = (
    "A value with an apostrophe in it (a tenant is called o'neil) has become a part of the SQL: so could anything that "
    "a user types. Hand values over as parameters."
)
LEAK = (
    "The tenant was set for a session, and the session is not yours: PgBouncer gives it to whoever comes next. What "
    "does transaction mode keep together on one server connection? The setting must not outlast that, nor be made "
    "outside of it."
)
NO_ROWS = (
    "The policy saw no tenant, or not this one. Either the setting was gone before the query ran (what is `local` ends "
    "with its transaction, and in autocommit each statement is one), or it went to the other server connection. What "
    "does transaction mode keep together on one server connection?"
)
BEHIND = (
    "Something that your function set is still there after it. PgBouncer runs no `server_reset_query` in transaction "
    "mode, and what you send later may reach the other server connection. Which kind of setting ends by itself, when "
    "the transaction does, whatever way that ends?"
)
MEANWHILE = (
    "What your function set outlived its transaction. Setting it back is a transaction of its own: before that comes, "
    "PgBouncer gives the server connection to another client that waits for it. Which kind of setting ends by itself, "
    "together with the transaction?"
)
BEHIND_ERROR = (
    "After a query that works you clean up; after one that fails you do not, or the cleaning goes elsewhere. Follow "
    "the path of the exception. Which kind of setting needs no cleaning, because it ends with the transaction?"
)
NOT_SET = (
    "The query ran without the report's settings. Setting and query must reach the same server connection: what does "
    "transaction mode keep together? And what is `local` ends with its transaction; in autocommit each statement is "
    "one."
)
WITH_ROLE = (
    "You have set it for the role. So every session of the application that begins from now on runs all of its queries "
    "with it, and the report gets it from new server connections only. It is to hold for one transaction."
)
MADE_UP = (
    "The rows that your function returned say one thing, and the query that read `orders` ran with another, or did not "
    "run. Have the server run the report's query with both settings, and return the row that it gives."
)
TEMPORARY = (
    "A temporary table belongs to one server connection, and stays there until somebody drops it there. The statements "
    "of one import went to different ones, or an earlier import has left its table. Keep them together, and have the "
    "table end with them: the page of `CREATE TABLE` says how, under `ON COMMIT`."
)
EARLIER = (
    "This row is of an earlier import, which failed: its table was still there, with its rows. Have the table end with "
    "the import's transaction (`ON COMMIT`), so that each import makes its own."
)
LEFT = (
    "The table is still on a server connection that other clients use: a client that creates one of that name there "
    "gets an error. `CREATE TABLE` knows a way to have a temporary table end with its transaction (`ON COMMIT`)."
)
HALF = "An import that fails must change nothing: all of its statements belong into one transaction."
BOTH_AT_IT = (
    "A session-level lock belongs to a server connection. Two workers that PgBouncer serves with the same one both get "
    "it, for a session may take its own lock again. The lock must last exactly as long as the server connection is "
    "yours: the page on advisory locks knows two levels."
)
LOCK_GONE = (
    "The lock was gone before the job ran: what is transaction-level ends with its transaction, and in autocommit each "
    "statement is one."
)
LOCK_LEFT = (
    "The lock outlasts the job, on a server connection that others use by now: nobody closes the next day. An unlock "
    "that goes to another server connection unlocks nothing (it returns false, with a warning). Which level of "
    "advisory lock is released by the server, also after an error?"
)
ANOTHER_PROGRAM = (
    f"Another program, on another machine maybe, holds advisory lock {NIGHTLY} and is at the job. Only the server can "
    f"tell your workers about it: not a lock in Python. Ask it for the lock with the number {NIGHTLY}."
)
WAITED = (
    "A worker that finds the job taken must say False at once. One that waits for the lock does the job a second time "
    "when the first is done, and holds a server connection meanwhile. There is a form that tries, and does not wait."
)
NOT_AT_IT = (
    "The worker said True and did not do the job, or did it twice. True means: the lock was mine, and the day is in "
    "`closing`."
)
DEAF = (
    "LISTEN belongs to a session: the server sends notifications to the connection that has executed it. Behind "
    "PgBouncer in transaction mode that is a server connection which others use by now, so nothing reaches you. Which "
    "of the application's two DSNs gives a session that stays yours?"
)
DEAF_TRANSACTION = (
    "The session that listens is still inside the transaction in which it said so. LISTEN begins when that "
    "transaction is committed."
)
DEAF_ELSE = "A session of its own is there, and hears nothing. Which channel does it listen to, and who reads from it?"
DEAF_LATE = (
    "`events` has opened a connection of its own, and heard what was sent from then on. What was sent before it "
    "listened is lost: listen once, in `listen`, and have `events` read from that connection."
)
LATE = (
    "`events` returns after `seconds` at the latest, with what has come until then. What does psycopg's `notifies` "
    "take besides `stop_after`?"
)
WHOLE_TIME = (
    "`events` returns as soon as it has `many` payloads; `seconds` is for the case that they do not come. What does "
    "psycopg's `notifies` take besides `timeout`?"
)
DROPPED = (
    "What had come beyond `many` was read and thrown away. Leave it to the next call, or return it: no notification "
    "comes twice."
)
DEAF_FOREVER = (
    "The listener's session was ended, and nobody learns of it: an empty list says that nothing was sent. Let "
    "psycopg's error go on to the caller, who then calls `listen` again, or listen again yourself."
)
PAST = (
    "Some of your connections go past PgBouncer, and each takes a slot of the server for as long as it is open. A "
    "transaction needs no session of its own; only what must keep one may use `direct_dsn`. Which function uses it?"
)
NOTHING = "`start` has returned None, so that is what your functions get as `app`. Return what the application keeps."
UNCHANGED = (
    "The caller must get the server's error as it is: it tells nonsense from an outage. Look at what your function "
    "does between the error and its end; in a failed transaction the server refuses each further statement."
)
STARTUP = (
    "PgBouncer refuses what it cannot keep for a client: settings that come with the connection (`options`) are those "
    "of a session. Set what you need inside the transaction that needs it."
)
NO_LISTENER = "`listen` has returned None, so that is what `events` gets. Return what `events` needs."
MIXED = (
    "The import wrote rows of another one, or lost some of its own: others use the same temporary table on the same "
    "server connection, between your statements. Keep the statements of an import together. (What is returned is a "
    "number, as `rowcount` has it.)"
)
FORM = "Return what the colleague's function returns, in the same form."
