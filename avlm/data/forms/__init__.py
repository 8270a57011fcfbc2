"""Rows in the forms that people have them in, to samples; and where their media lie."""
