"""What code written for the classic library gets: the same scenarios run in both libraries, and their numbers compared.

`scenarios/` is code as notebooks have it. `make_reference.py` ran it with the classic library, in an environment of its
own, and stored what came out in `reference/`; the tests run it with this library.
"""
