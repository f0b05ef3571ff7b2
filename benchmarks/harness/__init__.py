"""Measures: subjects in turns, processes of their own, floors of the machine, reports and their files."""
