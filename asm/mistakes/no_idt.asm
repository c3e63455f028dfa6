; Memory that is not mapped, before there is an IDT.
bits 64
org 0x1000

    mov rbx, 0x4000000000       ; the first tables end at 4 GiB
    mov al, [rbx]
