# A balloon driver without an operating system, x86-64. In: rbx = virtio-mmio registers, rsi = RAM.
# Ring of 8 at RAM+0x1000 (descriptors), +0x1100 (avail), +0x1140 (used); command ids at +0x1200; result at +0x1300.
    .intel_syntax noprefix
    .text
start:
    lea rsp, [rsi + 0xff0]
    cmp dword ptr [rbx], 0x74726976         # MagicValue
    jne fail
    cmp dword ptr [rbx + 0x04], 2           # Version
    jne fail
    cmp dword ptr [rbx + 0x08], 5           # DeviceID: a balloon
    jne fail
    mov dword ptr [rbx + 0x70], 0           # Status: reset, and wait for it
1:  cmp dword ptr [rbx + 0x70], 0
    jne 1b
    mov dword ptr [rbx + 0x70], 1           # ACKNOWLEDGE
    mov dword ptr [rbx + 0x70], 3           # DRIVER
    mov dword ptr [rbx + 0x14], 0           # DeviceFeaturesSel: is FREE_PAGE_HINT offered?
    test dword ptr [rbx + 0x10], 8
    jz fail
    mov dword ptr [rbx + 0x14], 1           # and VERSION_1?
    test dword ptr [rbx + 0x10], 1
    jz fail
    mov dword ptr [rbx + 0x24], 0           # take these two
    mov dword ptr [rbx + 0x20], 8
    mov dword ptr [rbx + 0x24], 1
    mov dword ptr [rbx + 0x20], 1
    mov dword ptr [rbx + 0x70], 11          # FEATURES_OK, and see whether it stays
    test dword ptr [rbx + 0x70], 8
    jz fail
    mov dword ptr [rbx + 0x30], 3           # QueueSel: the hinting queue
    cmp dword ptr [rbx + 0x34], 8           # QueueSizeMax
    jb fail
    cmp dword ptr [rbx + 0x44], 0           # QueueReady
    jne fail
    mov dword ptr [rbx + 0x38], 8           # QueueSize
    lea eax, [rsi + 0x1000]
    mov dword ptr [rbx + 0x80], eax         # QueueDesc
    mov dword ptr [rbx + 0x84], 0
    lea eax, [rsi + 0x1100]
    mov dword ptr [rbx + 0x90], eax         # QueueDriver
    mov dword ptr [rbx + 0x94], 0
    lea eax, [rsi + 0x1140]
    mov dword ptr [rbx + 0xa0], eax         # QueueDevice
    mov dword ptr [rbx + 0xa4], 0
    mov dword ptr [rbx + 0x44], 1           # QueueReady
    mov dword ptr [rbx + 0x70], 15          # DRIVER_OK
2:  call command                            # wait until the host asks for hints
    cmp eax, 2
    jb 2b
    mov dword ptr [rsi + 0x1200], eax       # start(id)
    mov dword ptr [rsi + 0x1204], 0         # stop
    lea rax, [rsi + 0x1200]                 # descriptor 0: the id, read by the device
    mov qword ptr [rsi + 0x1000], rax
    mov dword ptr [rsi + 0x1008], 4
    lea rax, [rsi + 0x40000]                # 1 and 2: free blocks of 256 KiB, written by the device
    mov qword ptr [rsi + 0x1010], rax
    mov dword ptr [rsi + 0x1018], 0x40000
    mov word ptr [rsi + 0x101c], 2
    lea rax, [rsi + 0x80000]
    mov qword ptr [rsi + 0x1020], rax
    mov dword ptr [rsi + 0x1028], 0x40000
    mov word ptr [rsi + 0x102c], 2
    lea rax, [rsi + 0x1204]                 # 3: stop
    mov qword ptr [rsi + 0x1030], rax
    mov dword ptr [rsi + 0x1038], 4
    movabs rax, 0x0003000200010000          # avail ring 0, 1, 2, 3
    mov qword ptr [rsi + 0x1104], rax
    sfence                                  # before the index
    mov word ptr [rsi + 0x1102], 4
    mfence                                  # before the notification
    mov dword ptr [rbx + 0x50], 3           # QueueNotify
3:  cmp word ptr [rsi + 0x1142], 4          # all used?
    jne 3b
4:  call command                            # the blocks are kept until DONE
    cmp eax, 1
    jne 4b
    movzx eax, word ptr [rsi + 0x1142]
    mov dword ptr [rsi + 0x1300], eax
    jmp end
command:                                    # wait for a config interrupt; eax = free_page_hint_cmd_id
    mov eax, dword ptr [rbx + 0x60]         # InterruptStatus
    and eax, 3
    jz command
    mov dword ptr [rbx + 0x64], eax         # InterruptACK
    test eax, 2
    jz command
5:  mov ecx, dword ptr [rbx + 0xfc]         # ConfigGeneration, before and after
    mov eax, dword ptr [rbx + 0x108]
    cmp ecx, dword ptr [rbx + 0xfc]
    jne 5b
    ret
fail:
    mov dword ptr [rsi + 0x1300], 0xdead
end:
