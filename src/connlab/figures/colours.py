"""The colours of the course's figures: each means the same in all of them.

They are Okabe and Ito's, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/),
and greys for what does nothing. No figure relies on colour alone: areas are stacked in one order and labelled.
"""

WORKING = "#0072B2"
"""Borrowed, active, linked to a server: it does something, or is held by somebody."""
IDLE = "#C8C8C8"
"""Open and free."""
WAITING = "#D55E00"
"""Somebody who wants a connection and has none; also errors."""
IN_TRANSACTION = "#CC79A7"
"""Idle in a transaction: held, and doing nothing."""
ABORTED = "#7F3C66"
OPENING = "#56B4E9"
"""Being opened, checked or logged in."""
LOCK = "#E69F00"
"""Active, and waiting for a lock."""
LIMIT = "#000000"
OTHER = "#009E73"
GAP = "#F0F0F0"
TEXT = "#222222"

CLIENTS = ("#0072B2", "#3D95C8", "#0B4A73")
"""Shades of ``WORKING``, to tell neighbours apart who do the same."""
