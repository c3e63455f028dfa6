; Real mode: stack, calls, a far segment, 16- and 32-bit registers, ports, HLT.
%include "probe.inc"
bits 16
org 0x1000

    xor ax, ax
    mov ds, ax
    mov dx, NONCE
    in eax, dx
    push eax
    call triple
    mov [RESULT], eax           ; three times the number
    mov bx, TARGET >> 4
    mov es, bx
    pop dword [es:0x10]         ; the number itself, beyond 64 KiB
    step 1
    hlt

triple:
    mov ebx, eax
    mov cx, 2
.add:
    add eax, ebx
    loop .add
    ret
