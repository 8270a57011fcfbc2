"""Conversations to tokens: templates, pieces, turns, vocabularies. What is learned is known by construction."""
