"""The shipped records, replayed once for all tests of a process: it takes seconds."""

from functools import cache

from memplan.validation import Validation, validate


@cache
def shipped() -> Validation:
    return validate()
