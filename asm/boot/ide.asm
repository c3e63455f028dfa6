; A boot sector that touches ports as it is told and notes what it reads: a list at 0x10000 of accesses, which a test
; has put there. It is a disk driver whose driver is the test.
bits 16
org 0x7C00

%include "ports.inc"

LIST        equ 0x1000          ; its segment
struc STEP
.what       resw 1              ; which of `steps`
.port       resw 1              ; or which interrupt line
.value      resw 1              ; what is written; becomes what was read. Of string instructions the count
.segment    resw 1              ; where a string instruction has its data
endstruc

PIC1        equ 0x20
PIC2        equ 0xA0
EOI         equ 0x20
TICKS       equ 0x46C           ; 18.2 a second, counted by the BIOS
PATIENCE    equ 91              ; ticks that an interrupt may take
SILENCE     equ 2               ; ticks after which none is taken to come

    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7C00
    cld
    ; Lines 14 and 15 at the vectors where the BIOS has put the second PIC.
    cli
    mov word [0x76 * 4], line_14
    mov word [0x76 * 4 + 2], ax
    mov word [0x77 * 4], line_15
    mov word [0x77 * 4 + 2], ax
    in al, PIC2 + 1
    and al, 0x3F
    out PIC2 + 1, al
    sti
    mov ax, LIST
    mov fs, ax
    xor bp, bp
next:
    mov bx, [fs:bp + STEP.what]
    mov dx, [fs:bp + STEP.port]
    mov cx, [fs:bp + STEP.value]
    mov es, [fs:bp + STEP.segment]
    xor si, si
    xor di, di
    add bx, bx
    call [steps + bx]
    mov [fs:bp + STEP.value], ax
    add bp, STEP_size
    jmp next

steps dw end, write, read, read_words, write_words, interrupts

end:
    mov al, 0
    out DEBUG_EXIT, al
    jmp $

write:
    mov al, cl
    out dx, al
    ret

read:
    mov ah, 0
    in al, dx
    ret

read_words:
    rep insw
    xor ax, ax
    ret

write_words:
    push es
    pop ds
    rep outsw
    xor ax, ax
    mov ds, ax
    ret

; Waits for CX interrupts of line DX, or for none, and says how many have come since the last time.
interrupts:
    mov di, dx
    add di, di
    mov bx, SILENCE
    jcxz .wait
    mov bx, PATIENCE
.wait:
    mov ax, [TICKS]
    mov dx, ax
.again:
    mov ax, [TICKS]
    sub ax, dx
    cmp ax, bx
    jae .over
    jcxz .again
    cmp [count_14 - 14 * 2 + di], cx
    jb .again
.over:
    xor ax, ax
    xchg ax, [count_14 - 14 * 2 + di]
    ret

; As in a system's driver that has had its data: the status isn't read.
line_14:
    inc word [cs:count_14]
    jmp acknowledge
line_15:
    inc word [cs:count_15]
acknowledge:
    push ax
    mov al, EOI
    out PIC2, al
    out PIC1, al
    pop ax
    iret

count_14 dw 0
count_15 dw 0

    times 510 - ($ - $$) db 0
    dw 0xAA55
