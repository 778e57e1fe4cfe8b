"""When Python's garbage collector looks through everything: not while libraries are imported, and never through them.

Half a million objects are imported, and the collector's third generation would go over all that are there again each
time that they have grown by a quarter: a fifth of the seconds that the imports take.
"""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
RARELY = 1000
"""Collections of the second generation before one of the third; a command that loads no model stays below it."""


def put_off_collections() -> None:
    """For a process that is about to import the libraries."""
    gc.set_threshold(*USUAL[:2], RARELY)


def leave_imports_alone() -> None:
    """Ends that, before a model is loaded: collections are as usual, and go over what comes from now on."""
    if gc.get_threshold()[2] == RARELY:
        gc.set_threshold(*USUAL)
        gc.freeze()
