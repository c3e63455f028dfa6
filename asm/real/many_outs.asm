; Writes ECX, ECX - 1, … 1 to port 0x100, one after the other: the port's side of many_writes.asm.
bits 16
org 0x1000
%include "hypercall.inc"

    mov dx, 0x100
.next:
    mov eax, ecx
    out dx, eax
    dec ecx
    jnz .next
    END_WELL
