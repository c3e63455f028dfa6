; An address whose upper bits are not all alike.
bits 64
org 0x1000

    mov rbx, 0x800000000000
    mov [rbx], al
