/* C entry point to what a peer gave: see peer_api.h for the interface. */
#ifndef VIRTIO_BALLOON_PEER_H
#define VIRTIO_BALLOON_PEER_H

#include <stdint.h>

#include "peer/peer_api.h"

#endif
