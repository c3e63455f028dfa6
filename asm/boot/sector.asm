; The boot sector: the 512 bytes of a disk that a PC's firmware loads to 0x7C00 and jumps to, in real mode,
; with the drive's number in DL. That they end in 55 AA is all that makes them a boot sector.
;
; 446 bytes of code cannot load much (the rest would hold a partition table). They load the second
; stage, which can be as long as it likes.
bits 16
org 0x7C00

%include "ata.inc"
%include "disk.inc"
%include "ports.inc"

    cli                         ; there is no interrupt that we would want
    cld
    jmp 0:start                 ; firmware may have come here as 07C0:0000
start:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7C00              ; the stack grows down from our first byte
    mov al, ATA_NIEN
    mov dx, ATA_CONTROL
    out dx, al
    mov si, hello
    call put_text

    ; The second stage's first sector says how long it is.
    mov eax, 1
    mov di, STAGE2
    call read_sector
    mov si, unreadable
    jc fail
    mov si, no_stage2
    cmp dword [STAGE2 + HDR_MAGIC], BOOT_MAGIC
    jne fail
    mov bp, [STAGE2 + HDR_SECTORS]
    mov si, bad_length
    dec bp
    cmp bp, STAGE2_MAX - 1      ; 0 has become the largest number
    ja fail
.next:
    test bp, bp
    jz .loaded
    call read_sector
    mov si, unreadable
    jc fail
    dec bp
    jmp .next

    ; A half-written disk would crash later and elsewhere. Better to find out here.
.loaded:
    mov cx, [STAGE2 + HDR_SECTORS]
    shl cx, 8                   ; 256 words in each
    xor bx, bx
    mov si, STAGE2
.sum:
    lodsw
    add bx, ax
    loop .sum
    mov si, bad_sum
    jnz fail                    ; loop leaves the flags as the addition set them
    jmp STAGE2 + HDR_LENGTH

; Says why on the serial port and gives up.
fail:
    call put_text
    mov al, 1
    out DEBUG_EXIT, al
.halt:
    hlt
    jmp .halt

READ_SECTOR

%include "print_text.inc"

hello       db "boot sector: loading stage 2", 13, 10, 0
unreadable  db "boot sector: disk error", 13, 10, 0
no_stage2   db "boot sector: no stage 2", 13, 10, 0
bad_length  db "boot sector: bad length of stage 2", 13, 10, 0
bad_sum     db "boot sector: bad checksum of stage 2", 13, 10, 0

    times 446 - ($ - $$) db 0   ; code ends here
    times 510 - ($ - $$) db 0   ; no partitions
    dw 0xAA55
