; Takes eight keys with one instruction and one exit, and prints them in reverse. The processor repeats INSB
; by itself, and KVM collects the repetitions: size 1, count 8.
bits 16
org 0x1000
%include "ports.inc"

COUNT   equ 8

    cld
    mov di, keys
    mov cx, COUNT
    mov dx, HYPER_GETCHAR
    rep insb

    std                         ; downwards
    mov si, keys + COUNT - 1
    mov cx, COUNT
    mov dx, HYPER_PUTCHAR
    rep outsb
    mov al, 10
    out dx, al
    EXIT_WELL

keys:
    times COUNT db 0
