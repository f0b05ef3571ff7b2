"""`topklm bench`: how fast the parts are on this machine, beside what it could do and beside peers."""
