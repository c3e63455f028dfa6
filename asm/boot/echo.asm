; A boot sector that is a typewriter: what is typed appears on the screen by the BIOS, until Ctrl-D.
bits 16
org 0x7C00

%include "ports.inc"

next:
    mov ah, 0x00                ; waits for a key: its character in AL
    int 0x16
    cmp al, 4
    je .end
    mov ah, 0x0E                ; prints it as a teletype does
    int 0x10
    cmp al, 13
    jne next
    mov al, 10                  ; Enter is a carriage return only
    int 0x10
    jmp next
.end:
    mov al, 0
    out DEBUG_EXIT, al
    jmp $

    times 510 - ($ - $$) db 0
    dw 0xAA55
