"""Runnable examples, and the weights that ship with the library."""
