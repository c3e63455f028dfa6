; Every way in which 16-bit code makes an exit for a device, for who wants to know which instruction it was.
bits 16
org 0x1000
%include "ports.inc"
%include "accesses.inc"

PORT        equ 0x80
DEVICE      equ 0xA000              ; two pages behind the RAM
buffer      equ 0x2000

    BEGIN_ACCESSES
    cld
    mov al, 1
    EXITS 1, out PORT, al
    EXITS 1, out PORT, al           ; before and behind this one it looks the same
    mov dx, PORT
    mov al, 0x66                    ; as a prefix it would make the next instruction another one
    EXITS 1, out dx, al
    mov al, 0xF3
    EXITS 1, out dx, al
    mov eax, 0x44332211
    EXITS 1, out dx, ax
    EXITS 1, out dx, eax
    EXITS 1, in al, PORT
    EXITS 1, in ax, dx
    EXITS 1, in eax, dx
    mov si, buffer
    mov cx, 3
    EXITS 3, rep outsb
    mov cx, 2
    EXITS 2, rep outsw
    EXITS 1, outsd
    mov di, buffer
    mov cx, 4
    EXITS 1, rep insw               ; KVM hands it over as one
    EXITS 1, insb

    mov bx, DEVICE
    mov es, bx
    mov di, 0x10
    EXITS 1, mov [es:0x10], al
    EXITS 1, mov [es:di], al
    EXITS 1, mov [es:di], al
    EXITS 1, mov dword [es:0x14], 0x12345678
    EXITS 1, mov ax, [es:0x12]
    EXITS 2, inc byte [es:0x14]     ; read, and write
    EXITS 2, mov [es:0xFFE], eax    ; to two pages
    mov cx, 3
    EXITS 3, rep stosw
    std
    mov cx, 2
    EXITS 2, rep stosb
    cld
    push es
    pop ds
    xor si, si
    EXITS 2, movsb                  ; from the device to the device

    xor ax, ax
    EXITS 1, out DEBUG_EXIT, al
