"""Training data for the question who is meant: speech and sounds, addressed to the model or not.

`build` makes a folder of rows and of held-out timelines from texts, by synthetic speech. `gate` tells where somebody
speaks, in a row's sound as in a session's.
"""
