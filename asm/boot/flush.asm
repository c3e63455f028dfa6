; A boot sector that writes to its disk for as long as it is let, and tells of each sector when it is safe.
;
; Sectors 1 to SLOTS are a journal: each is filled with one number of 32 bits, and the next number goes to the next
; sector. When FLUSH CACHE has ended, the number is printed in hex. It begins behind the greatest that it finds.
bits 16
org 0x7C00

%include "ata.inc"
%include "ports.inc"

SLOTS       equ 16
ATA_WRITE   equ 0x30
ATA_FLUSH   equ 0xE7
BUFFER      equ 0x8000

    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7C00
    mov dx, ATA_CONTROL
    mov al, ATA_NIEN
    out dx, al

    mov eax, 1
.find:
    mov di, BUFFER
    call read_sector
    jc failed
    mov ecx, [BUFFER]
    cmp ecx, [number]
    jbe .less
    mov [number], ecx
.less:
    cmp eax, SLOTS
    jbe .find

write:
    inc dword [number]
    mov eax, [number]
    mov di, BUFFER
    mov cx, 128
    rep stosd

    mov dx, ATA_COUNT
    mov al, 1
    out dx, al
    inc dx
    mov al, [number]            ; sector 1 + number % SLOTS
    and al, SLOTS - 1
    inc al
    out dx, al
    mov al, 0
    inc dx
    out dx, al
    inc dx
    out dx, al
    inc dx
    mov al, ATA_LBA
    out dx, al
    inc dx
    mov al, ATA_WRITE
    out dx, al
    mov ah, ATA_DRQ
    call wait_for
    mov si, BUFFER
    mov dx, ATA_DATA
    mov cx, 128
    rep outsd
    mov dx, ATA_COMMAND
    mov ah, 0
    call wait_for
    mov al, ATA_FLUSH
    out dx, al
    call wait_for

    ; Now it may be told.
    mov edx, [number]
    mov cx, 8
.digit:
    rol edx, 4
    mov al, dl
    and al, 0x0F
    cmp al, 10
    sbb al, 0x69
    das                         ; 0 to 15 have become '0' to 'F'
    call put_char
    loop .digit
    mov al, 10
    call put_char
    jmp write

; Waits until the drive has done what it was told, and for the bits of AH in its status. Changes AL and DX.
wait_for:
    mov dx, ATA_STATUS
.again:
    in al, dx
    test al, ATA_BSY
    jnz .again
    test al, ATA_FAILED
    jnz failed
    and al, ah
    cmp al, ah
    jne .again
    ret

failed:
    mov al, 1
    out DEBUG_EXIT, al
    jmp $

number dd 0

READ_SECTOR
%include "put_char.inc"

    times 510 - ($ - $$) db 0
    dw 0xAA55
