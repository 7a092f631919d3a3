"""Other libraries, measured beside ours.

Each lives in an environment of its own, in a process that answers requests: `process` is our side of the pipe,
`serving` theirs. What runs over there imports nothing of ours.
"""
