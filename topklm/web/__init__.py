"""The part that the servers share: checks of requests, and answering on one port until told to stop."""
