"""The parts of `topklm neurons card`, which need packages of the extra `explore`."""
