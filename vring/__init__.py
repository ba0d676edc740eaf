"""Everything virtio that is not balloon: guest memory, dirty logs, split virtqueues, device status, vhost-user messages."""
