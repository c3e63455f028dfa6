; A boot sector that makes room for another one: the sector behind it goes to 0x7C00, as if the BIOS had put it there, and
; the 32 sectors behind that to 0x10000, where services.asm and ide.asm find what they are to do. So a disk's file has it
; all.
bits 16
org 0x0600

%include "ports.inc"

BOOT_SECTOR equ 0x7C00

    cli
    cld
    xor ax, ax
    mov ss, ax
    mov sp, BOOT_SECTOR
    mov ds, ax
    mov es, ax
    mov si, BOOT_SECTOR
    mov di, $$
    mov cx, 512 / 2
    rep movsw
    jmp 0:moved
moved:
    sti
    mov si, list
    call load
    mov si, sector
    call load
    jmp BOOT_SECTOR

; Loads what the packet at SI says from the drive DL. Changes AH.
load:
    mov ah, 0x42
    int 0x13
    jnc .well
    mov al, 1
    out DEBUG_EXIT, al
    jmp $
.well:
    ret

list:                           ; bytes, sectors; offset, segment; the first sector
    dw 16, 32, 0x0000, 0x1000
    dq 2
sector:
    dw 16, 1, BOOT_SECTOR, 0x0000
    dq 1

    times 510 - ($ - $$) db 0
    dw 0xAA55
