"""QEMU machines, looked at from outside: over QMP, and in the memory that they share.

``client`` speaks QMP, ``ram_map`` and ``ram_file`` say where guest memory lies, ``machine`` what the machine
is and whether it can be migrated, ``device_state`` what QEMU's own devices are; ``source`` and ``target`` are
the two guests made of these.
"""
