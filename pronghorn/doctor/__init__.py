"""Checks that this machine can do Pronghorn's work, each with the command that mends what it finds."""
