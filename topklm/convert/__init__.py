"""Models of other libraries' formats, written and read."""
