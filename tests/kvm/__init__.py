"""A small machine on /dev/kvm, so that the engines meet a hypervisor's own dirty log."""
