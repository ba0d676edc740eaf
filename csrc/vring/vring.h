/* C entry point to the split virtqueue: see vring_api.h for the interface. */
#ifndef VIRTIO_BALLOON_VRING_H
#define VIRTIO_BALLOON_VRING_H

#include <stddef.h>
#include <stdint.h>

#include "vring/vring_api.h"

#endif
