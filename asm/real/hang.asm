; Waits for a byte to change that nobody writes. There is no exit in that: KVM_RUN never returns by itself.
bits 16
org 0x1000

    xor ax, ax
wait_for_it:
    cmp byte [flag], 0
    je wait_for_it
    hlt

flag:
    db 0
