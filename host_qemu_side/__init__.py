"""The hypervisor's side: vhost-user back end, live migration, discarding memory, launching guests."""
