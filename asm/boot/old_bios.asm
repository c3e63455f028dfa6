; A boot sector that takes from the BIOS what it has learned since the early nineties, and then boots the MBR that
; somebody has put into the next sector: int 13h knows no linear addresses, int 15h no A20 gate, and the gate
; is shut.
bits 16
org 0x7C00

RESIDENT    equ 0x8000          ; the segment of what stays in memory

    cli
    cld
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7C00
    mov di, dx
    mov ax, RESIDENT
    mov es, ax
    mov si, 0x7C00
    mov cx, 512
    push di
    xor di, di
    rep movsb
    jmp RESIDENT:moved - $$
moved:
    mov eax, [0x13 * 4]
    mov [es:old_13 - $$], eax
    mov word [0x13 * 4], int_13 - $$
    mov [0x13 * 4 + 2], es
    mov eax, [0x15 * 4]
    mov [es:old_15 - $$], eax
    mov word [0x15 * 4], int_15 - $$
    mov [0x15 * 4 + 2], es
    sti
    in al, 0x92
    and al, ~3
    out 0x92, al

    pop dx
    push dx
    mov ax, 0x0201              ; one sector: cylinder 0, sector 2, head 0
    mov cx, 2
    mov dh, 0
    xor bx, bx
    mov es, bx
    mov bh, 0x7C
    int 0x13
    pop dx
    jmp 0:0x7C00

int_13:
    cmp ah, 0x41
    jae unknown
    jmp far [cs:old_13 - $$]
int_15:
    cmp ah, 0x24
    je unknown
    jmp far [cs:old_15 - $$]
unknown:
    mov ah, 1
    push bp
    mov bp, sp
    or byte [bp + 6], 1         ; the caller's carry
    pop bp
    iret

old_13      dd 0
old_15      dd 0

    times 510 - ($ - $$) db 0
    dw 0xAA55
