"""Reward functions and the runner that calls them, checks what they return, and names the one that is at fault.

A leaf package: it imports nothing of Pronghorn but `config`.
"""
