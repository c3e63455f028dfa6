; A boot sector that changes what the keyboard sends before the BIOS sees it, by int 15h, function 4Fh: B instead of A, and no
; X at all. It says `>` when it has begun, and ends well if that is how a, x and Enter arrive.
bits 16
org 0x7C00

%include "ports.inc"

    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7C00
    cli
    mov eax, [0x15 * 4]
    mov [next], eax
    mov dword [0x15 * 4], intercept
    sti
    mov ax, 0x0E00 | '>'
    int 0x10
    mov si, expected
.key:
    mov ah, 0x00
    int 0x16
    cmp ax, [si]
    jne failed
    add si, 2
    cmp si, expected.end
    jb .key
    mov al, 0
    jmp end
failed:
    mov al, 1
end:
    out DEBUG_EXIT, al
    jmp $

; Carry comes in set, and goes back clear if the code in AL is not for the BIOS.
intercept:
    cmp ah, 0x4F
    jne .pass
    mov ah, al
    and ah, 0x7F
    cmp ah, 0x2D                ; X
    je .drop
    cmp ah, 0x1E                ; A
    jne .keep
    add al, 0x30 - 0x1E         ; B
.keep:
    mov ah, 0x4F
    stc
    retf 2                      ; with the flags as they are
.drop:
    mov ah, 0x4F
    clc
    retf 2
.pass:
    jmp far [cs:next]

next        dd 0
expected    dw 0x3062, 0x1C0D
.end:

    times 510 - ($ - $$) db 0
    dw 0xAA55
