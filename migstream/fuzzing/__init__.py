"""Streams taken apart, mutated and put together again, for whoever fuzzes a reader of streams.

`tree` makes nodes of a stream that can be edited, `mutations` is the table of what may be done to them,
`mutator` does some of it, from a seed; `afl` gives it to AFL++; `campaign` runs a program on what comes out.
"""
