"""A monitor that speaks QMP: framing and dispatch without I/O, and an adapter that puts them behind a Unix socket.

What the commands do is not here, see `host_qemu_side.serve`.
"""
