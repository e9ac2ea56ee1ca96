"""The two engines, save and restore, and what they share; `migrate` runs both ends.

`save` and `restore` open with what they do and in which order; ``spec/engines.md`` says it in words, with
each difference from Xen's own engines and its reason.
"""
