"""Waiting for descriptors: any number of them, the other end gone, time up."""

from __future__ import annotations

import fcntl
import os
import resource

from guest_driver.waiting import wait_readable


def test_descriptors_over_1023():
    """A host with many guests, or a test run, has more than 1024 descriptors open; select() cannot wait for such."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    out, back = os.pipe()
    try:
        high = fcntl.fcntl(out, fcntl.F_DUPFD_CLOEXEC, 2000)
        assert wait_readable([high], 0) == []
        os.write(back, b"x")
        assert wait_readable([out, high], 5) == [out, high]
        os.close(high)
    finally:
        os.close(out)
        os.close(back)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_other_end_is_gone():
    out, back = os.pipe()
    os.close(back)
    assert wait_readable([out], 5) == [out]
    os.close(out)
