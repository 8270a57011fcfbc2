"""Duplex voice: a gate, the model's own decision who was meant, answers that can be interrupted.

mind.py      what a session asks of a model: was that for me, and what is the answer
session.py   the course of a conversation: frames and typed texts in, events out
voice.py     spoken answers
drive.py     who feeds a session: a timeline in model time, a stream, a microphone
score.py     false and missed wake-ups on timelines whose truth is known
socket.py    the same over a WebSocket
"""
