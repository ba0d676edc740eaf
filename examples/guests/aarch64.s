// A balloon driver without an operating system, AArch64. In: x19 = virtio-mmio registers, x20 = RAM.
// Ring of 8 at RAM+0x1000 (descriptors), +0x1100 (avail), +0x1140 (used); command ids at +0x1200; result at +0x1300.
    .text
start:
    add  x21, x20, #0x1, lsl #12            // x21 = RAM+0x1000
    ldr  w0, [x19]                          // MagicValue
    movz w1, #0x6976
    movk w1, #0x7472, lsl #16
    cmp  w0, w1
    b.ne fail
    ldr  w0, [x19, #0x04]                   // Version
    cmp  w0, #2
    b.ne fail
    ldr  w0, [x19, #0x08]                   // DeviceID: a balloon
    cmp  w0, #5
    b.ne fail
    str  wzr, [x19, #0x70]                  // Status: reset, and wait for it
1:  ldr  w0, [x19, #0x70]
    cbnz w0, 1b
    mov  w0, #1                             // ACKNOWLEDGE
    str  w0, [x19, #0x70]
    mov  w0, #3                             // DRIVER
    str  w0, [x19, #0x70]
    str  wzr, [x19, #0x14]                  // DeviceFeaturesSel: is FREE_PAGE_HINT offered?
    ldr  w0, [x19, #0x10]
    tbz  w0, #3, fail
    mov  w1, #1                             // and VERSION_1?
    str  w1, [x19, #0x14]
    ldr  w0, [x19, #0x10]
    tbz  w0, #0, fail
    str  wzr, [x19, #0x24]                  // take these two
    mov  w0, #8
    str  w0, [x19, #0x20]
    str  w1, [x19, #0x24]
    str  w1, [x19, #0x20]
    mov  w0, #11                            // FEATURES_OK, and see whether it stays
    str  w0, [x19, #0x70]
    ldr  w0, [x19, #0x70]
    tbz  w0, #3, fail
    mov  w0, #3                             // QueueSel: the hinting queue
    str  w0, [x19, #0x30]
    ldr  w0, [x19, #0x34]                   // QueueSizeMax
    cmp  w0, #8
    b.lo fail
    ldr  w0, [x19, #0x44]                   // QueueReady
    cbnz w0, fail
    mov  w0, #8                             // QueueSize
    str  w0, [x19, #0x38]
    str  w21, [x19, #0x80]                  // QueueDesc
    str  wzr, [x19, #0x84]
    add  w0, w21, #0x100                    // QueueDriver
    str  w0, [x19, #0x90]
    str  wzr, [x19, #0x94]
    add  w0, w21, #0x140                    // QueueDevice
    str  w0, [x19, #0xa0]
    str  wzr, [x19, #0xa4]
    str  w1, [x19, #0x44]                   // QueueReady
    mov  w0, #15                            // DRIVER_OK
    str  w0, [x19, #0x70]
2:  bl   command                            // wait until the host asks for hints
    cmp  w0, #2
    b.lo 2b
    str  w0, [x21, #0x200]                  // start(id)
    str  wzr, [x21, #0x204]                 // stop
    add  x2, x21, #0x200                    // descriptor 0: the id, read by the device
    str  x2, [x21]
    mov  w3, #4
    str  w3, [x21, #0x08]
    add  x2, x20, #0x40, lsl #12            // 1 and 2: free blocks of 256 KiB, written by the device
    str  x2, [x21, #0x10]
    mov  w4, #0x40000
    str  w4, [x21, #0x18]
    mov  w5, #2
    strh w5, [x21, #0x1c]
    add  x2, x20, #0x80, lsl #12
    str  x2, [x21, #0x20]
    str  w4, [x21, #0x28]
    strh w5, [x21, #0x2c]
    add  x2, x21, #0x204                    // 3: stop
    str  x2, [x21, #0x30]
    str  w3, [x21, #0x38]
    add  x6, x21, #0x104                    // avail ring 0, 1, 2, 3
    strh wzr, [x6]
    strh w1, [x6, #2]
    strh w5, [x6, #4]
    mov  w0, #3
    strh w0, [x6, #6]
    dmb  ishst                              // before the index
    strh w3, [x21, #0x102]
    dmb  ish                                // before the notification
    str  w0, [x19, #0x50]                   // QueueNotify
3:  ldrh w0, [x21, #0x142]                  // all used?
    cmp  w0, #4
    b.ne 3b
4:  bl   command                            // the blocks are kept until DONE
    cmp  w0, #1
    b.ne 4b
    ldrh w0, [x21, #0x142]
    str  w0, [x21, #0x300]
    b    end
command:                                    // wait for a config interrupt; w0 = free_page_hint_cmd_id
    ldr  w0, [x19, #0x60]                   // InterruptStatus
    ands w0, w0, #3
    b.eq command
    str  w0, [x19, #0x64]                   // InterruptACK
    tbz  w0, #1, command
5:  ldr  w2, [x19, #0xfc]                   // ConfigGeneration, before and after
    ldr  w0, [x19, #0x108]
    ldr  w3, [x19, #0xfc]
    cmp  w2, w3
    b.ne 5b
    ret
fail:
    mov  w0, #0xdead
    str  w0, [x21, #0x300]
end:
