; A loop that waits for a byte which nobody writes.
bits 64
org 0x1000

.wait:
    pause
    cmp byte [flag], 0
    je .wait
    hlt
flag:
    db 0
