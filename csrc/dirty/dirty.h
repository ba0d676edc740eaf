/* C entry point to page bitmaps and dirty-page scans: see dirty_api.h for the interface. */
#ifndef VIRTIO_BALLOON_DIRTY_H
#define VIRTIO_BALLOON_DIRTY_H

#include <stddef.h>
#include <stdint.h>

#include "dirty/dirty_api.h"

#endif
