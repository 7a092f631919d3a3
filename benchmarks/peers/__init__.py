"""The contestants, each in a process of its own that answers requests.

`process` is the runner's side of the pipe, `serving` theirs, `contestant` what every one of them does. Other libraries
live in environments of their own: what runs over there imports nothing of ours. Only `ours` does.
"""
