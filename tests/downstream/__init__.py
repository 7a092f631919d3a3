"""Scripts in the manner of packages and notebooks that were written for the classic library, and what they give there.

`recipes.py` and its neighbours import `transformer_lens` and torch, and nothing of this library, so that they run with
both. `reference.json` holds the numbers of the classic library 3.9.0.
"""
