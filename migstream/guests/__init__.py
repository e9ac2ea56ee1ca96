"""Guests: what the engines save from and restore to. One file a hypervisor or image format."""
