; An endless loop.
bits 64
org 0x1000

    jmp $
