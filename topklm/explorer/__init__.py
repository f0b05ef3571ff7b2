"""Pages on which a person sees what the neurons of a run stand for: served on one port, or as one file."""
