"""Numbers computed with transformer_lens 3.9.0, stored, and what the tests of them share."""
