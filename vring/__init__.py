"""Everything virtio that is not balloon: guest memory, dirty logs, split virtqueues, vhost-user messages."""
