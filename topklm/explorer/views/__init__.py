"""The data of each page as plain values, for templates and for the JSON API."""
