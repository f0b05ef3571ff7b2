"""The data of each page as plain values: what templates draw, and what the JSON API gives."""
