"""What the servers share: who may ask, and answering on one port until told to stop."""
