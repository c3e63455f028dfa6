; The master boot record: the first sector of a disk, which the firmware loads to 0x7C00 and jumps to, in real
; mode, with the drive's number in DL. It holds the table of the disk's four partitions, and as much code as is
; left beside it: enough to load the first sector of the one that is active and to jump there in turn.
;
; That sector wants to be at 0x7C00, too: every boot sector does. So this one makes room first.
bits 16
org 0x0600

MBR         equ 0x0600          ; where it moves
BOOT_SECTOR equ 0x7C00
CODE_MAX    equ 440             ; the disk's signature and the table follow
TABLE       equ MBR + 446
ENTRIES     equ 4
SIGNATURE   equ 510             ; where a boot sector has its 55 AA

; An entry of the table.
struc PARTITION
.status     resb 1              ; 80h: active; 00h: not; anything else is no partition table
.first_chs  resb 3
.type       resb 1
.last_chs   resb 3
.start      resd 1              ; its first sector
.sectors    resd 1
endstruc

%include "progress.inc"

    cli
    cld
    xor ax, ax
    ; ANCHOR: make_room
    mov ss, ax
    mov sp, BOOT_SECTOR         ; the stack grows down from our first byte
    mov ds, ax
    mov es, ax
    mov si, BOOT_SECTOR
    mov di, MBR
    mov cx, 512 / 2
    rep movsw
    jmp 0:moved                 ; firmware may have come here as 07C0:0000
moved:
    ; ANCHOR_END: make_room
    sti
    mov [drive], dl
    PROGRESS 0x70

    ; ANCHOR: active
    ; One partition is active.
    xor bp, bp                  ; its entry
    mov di, TABLE
    mov cx, ENTRIES
.entry:
    mov al, [di + PARTITION.status]
    test al, 0x7F
    jnz .bad_table
    test al, al
    jz .next
    test bp, bp
    jnz .bad_table              ; two of them
    mov bp, di
.next:
    add di, PARTITION_size
    loop .entry
    ; ANCHOR_END: active
    mov si, no_active
    test bp, bp
    jz fail
    mov eax, [bp + PARTITION.start] ; SS is 0, as DS is
    test eax, eax
    jz .bad_table               ; that would be this sector

    mov cx, 1
    mov bx, BOOT_SECTOR >> 4
    mov es, bx
    call read_sectors
    mov si, no_boot_sector
    cmp word [BOOT_SECTOR + SIGNATURE], 0xAA55
    jne fail
    PROGRESS 0x71
    mov si, bp                  ; by custom a boot sector finds its partition's entry at DS:SI
    mov dl, [drive]
    jmp 0:BOOT_SECTOR

.bad_table:
    mov si, bad_table
    jmp fail

%include "read.inc"
%include "fail.inc"

no_active   db "MBR: no active partition", 0
bad_table   db "MBR: bad partition table", 0
no_boot_sector db "MBR: no boot sector", 0
unreadable  db "MBR: disk error "
.code       db "00h", 0

    times CODE_MAX - ($ - $$) db 0 ; code ends here
    times 510 - ($ - $$) db 0   ; common::boot_disk fills the rest
    dw 0xAA55
