; Writes ECX, ECX - 1, … 1 to guest-physical 0xA0000, one after the other. The monitor sets ECX. The work
; is the same each time; what it costs depends on what the monitor has told KVM about the address.
bits 16
org 0x1000
%include "hypercall.inc"

    mov ax, 0xA000
    mov es, ax
.next:
    mov [es:0], ecx
    dec ecx
    jnz .next
    END_WELL
