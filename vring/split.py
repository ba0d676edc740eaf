"""Split virtqueues (VIRTIO 1.2 to 1.4, section 2.7): the driver half and the device half, in batches.

The names to import; the halves are in `vring.driver_queue` and `vring.device_queue`, the layout in `vring.layout`.
What is inside the buffers is the business of others.
"""

from vring.device_queue import Batch, DeviceQueue
from vring.driver_queue import DriverQueue
from vring.layout import CHAIN, DESC, MAX_SIZE, SEG, SEG_WRITE, USED_ELEM, QueueLayout, dtype_of

__all__ = [
    "CHAIN",
    "DESC",
    "MAX_SIZE",
    "SEG",
    "SEG_WRITE",
    "USED_ELEM",
    "Batch",
    "DeviceQueue",
    "DriverQueue",
    "QueueLayout",
    "dtype_of",
]
