"""Compiling the train step for devices that are not there, and reading from the result what it will cost."""
