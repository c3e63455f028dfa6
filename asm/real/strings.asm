; Port I/O in all its widths, and a string instruction for each.
bits 16
org 0x1000
%include "ports.inc"

    cld

    ; Size 1. One instruction for the line; KVM makes it one exit a byte.
    mov si, by_bytes
    mov cx, by_bytes.len
    mov dx, SERIAL_DATA
    rep outsb

    ; Size 2 and size 4: the hypercall prints as many characters as an access has bytes.
    mov dx, HYPER_PUTCHAR
    mov si, by_words
    mov cx, by_words.len / 2
    rep outsw
    mov si, by_doubles
    mov cx, by_doubles.len / 4
    rep outsd

    ; No device is at this port: all bits are ones, in each width.
    mov dx, 0x1234
    xor eax, eax
    in al, dx
    mov [read_8], eax
    xor eax, eax
    in ax, dx
    mov [read_16], eax
    in eax, dx
    mov [read_32], eax
    mov si, no_device
    call put_text
    mov cx, 12
    mov eax, [read_8]
    call put_number
    mov eax, [read_16]
    call put_number
    mov eax, [read_32]
    call put_number
    call new_line
    EXIT_WELL

by_bytes:
    db "rep outsb: one instruction printed this line", 10
.len equ $ - by_bytes
    align 4
by_words:
    db "rep outsw: two characters an access", 10
.len equ $ - by_words
by_doubles:
    db "rep outsd: four characters an access...", 10
.len equ $ - by_doubles
no_device:
    db "in from a port without a device:", 0

%include "print.inc"

; Where the test of this stage finds what was read.
times 0x1800 - 0x1000 - ($ - $$) db 0
read_8:     dd 0                ; 0x1800
read_16:    dd 0                ; 0x1804
read_32:    dd 0                ; 0x1808
