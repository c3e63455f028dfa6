; Reads and writes where no RAM is: one by one in three sizes, and a string of four words.
%include "probe.inc"
bits 16
org 0x1000

    xor ax, ax
    mov ds, ax
    mov ax, 0xB800
    mov es, ax
    mov eax, [es:0]             ; the check-up answers with its number
    mov [RESULT], eax
    mov [es:4], al
    mov [es:6], ax
    mov [es:8], eax
    mov si, words
    mov di, 0x10
    mov cx, 4
    cld
    rep movsw
    hlt

words:
    dw 0x1111, 0x2222, 0x3333, 0x4444
