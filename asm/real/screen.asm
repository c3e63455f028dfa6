; Draws on the text screen: a title, the 256 characters, the 16 colours on their 8 backgrounds, and
; a row that is read back from the screen and written again. Each STOSW is an exit (KVM_EXIT_MMIO),
; also under REP; each MOVSW from the screen to the screen is two.
bits 16
org 0x1000
%include "screen.inc"
%include "hypercall.inc"

    cld
    mov ax, SCREEN
    mov es, ax

    ; The title bar: 80 blank cells on blue, then the text.
    mov di, CELL(0, 0)
    mov ax, 0x1F20
    mov cx, 80
    rep stosw
    mov di, CELL(0, 2)
    mov si, title
    mov ah, 0x1F
    call print

    ; A frame around 8 rows of 32 cells.
    mov si, characters
    mov di, CELL(2, 3)
    mov ah, 0x0F
    call print
    mov ax, 0x03C9                  ; top left corner, then the line, then the right corner
    mov bx, 0x03BB
    mov di, CELL(3, 2)
    call line
    mov dx, 8
    mov di, CELL(4, 2)
.sides:
    mov ax, 0x03BA
    stosw
    add di, 32 * 2
    stosw
    add di, (80 - 34) * 2
    dec dx
    jnz .sides
    mov ax, 0x03C8
    mov bx, 0x03BC
    mov di, CELL(12, 2)
    call line

    ; All characters.
    mov di, CELL(4, 3)
    mov ax, 0x0700
.glyph:
    stosw
    inc al
    jz .colours
    test al, 31
    jnz .glyph
    add di, (80 - 32) * 2
    jmp .glyph

    ; All colours: the attribute's low nibble is the foreground, the next three bits the background.
.colours:
    mov si, colours
    mov di, CELL(2, 42)
    mov ah, 0x0F
    call print
    mov di, CELL(4, 42)
    xor dl, dl
.colour:
    mov ah, dl
    mov al, 0xDB                    ; a full block, then a letter
    stosw
    mov al, 'a'
    stosw
    inc dl
    js .copy                        ; 0x80: the bit that makes a cell blink
    test dl, 15
    jnz .colour
    add di, (80 - 32) * 2
    jmp .colour

    ; What is read back is what was written: the title bar once more, from the screen itself.
.copy:
    mov si, copied
    mov di, CELL(14, 2)
    mov ah, 0x07
    call print
    push es
    pop ds
    xor si, si
    mov di, CELL(15, 0)
    mov cx, 80
    rep movsw
    END_WELL

; A horizontal line of 34 cells at ES:DI: AX at its left end, BX at its right, between them 0xCD.
line:
    stosw
    mov al, 0xCD
    mov cx, 32
    rep stosw
    mov ax, bx
    stosw
    ret

title:      db "mini-kvm: a text screen at 0xB8000, where no memory is", 0
characters: db "The characters of code page 437", 0
colours:    db "The 16 colours on 8 backgrounds", 0
copied:     db "The title read back from the screen, an exit each cell, and written, one more", 0

SCREEN_ROUTINES
