; Reads a text from the ROM at 0xF0000, tries to overwrite it, and looks again. A read-only memslot is
; memory for reads: they cost nothing and nobody sees them. A write to it exits, as to a device.
bits 16
org 0x1000
%include "screen.inc"
%include "hypercall.inc"

ROM         equ 0xF000              ; its segment

    cld
    mov ax, SCREEN
    mov es, ax

    ; What the ROM says: printed straight from it.
    mov di, CELL(0, 0)
    mov ax, ROM
    mov ds, ax
    xor si, si
    mov ah, 0x0A
    call print

    ; Overwrite it in all sizes, and let the CPU read, change and write it in one instruction.
    mov byte [0], '!'
    mov word [2], 0x2121
    mov dword [4], 0x21212121
    inc byte [8]

    ; Has it changed? The text must still be what is on the screen.
    xor si, si
    xor bx, bx
.compare:
    lodsb
    test al, al
    jz .same
    cmp al, [es:bx]
    jne .changed
    add bx, 2
    jmp .compare

.same:
    xor ax, ax
    mov ds, ax
    mov si, unchanged
    mov di, CELL(1, 0)
    mov ah, 0x07
    call print
    END_WELL

.changed:
    xor ax, ax
    mov ds, ax
    mov si, changed
    mov di, CELL(1, 0)
    mov ah, 0x0C
    call print
    END_BADLY

unchanged:  db "Four instructions tried to change this text. None has.", 0
changed:    db "The ROM has changed!", 0

SCREEN_ROUTINES
