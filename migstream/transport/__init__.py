"""Migrations between hosts: a guest's stream over TCP or a Unix socket, and who owns the guest meanwhile.

`send` and `receive` are the two ends, ``spec/transport.md`` is what they say to each other.
"""
