; Drives the square root coprocessor at 0xD0000: finds it, sets up the interrupt controllers and the
; interrupt's handler, and then for each number writes it, rings the doorbell and sleeps until the
; interrupt says that the root is there.
bits 16
org 0x1000
%include "screen.inc"
%include "hypercall.inc"

DEVICE      equ 0xD000              ; its segment: guest-physical 0xD0000
ID          equ 0x00
OPERAND     equ 0x04
DOORBELL    equ 0x08
STATUS      equ 0x0C
RESULT      equ 0x10
DONE        equ 1

IRQ         equ 5                   ; its line at the interrupt controller
VECTORS     equ 0x20                ; where the lines 0 to 7 begin in the vector table
VECTOR      equ VECTORS + IRQ

PIC1        equ 0x20                ; the first 8259: command and data port
PIC2        equ 0xA0                ; the second, whose output is line 2 of the first
EOI         equ 0x20

    cli
    cld
    mov sp, 0x1000
    mov ax, SCREEN
    mov es, ax
    mov ax, DEVICE
    mov fs, ax

    ; Is the device there? Where none is, ones are read.
    cmp dword [fs:ID], 'ROOT'
    jne missing

    ; The 8259s are initialized by four words each: ICW1 starts, ICW2 is the vector of the first line, ICW3
    ; how the two are connected, ICW4 the mode of the 8086. KVM has them in the kernel: no exits.
    mov al, 0x11
    out PIC1, al
    out PIC2, al
    mov al, VECTORS
    out PIC1 + 1, al
    mov al, VECTORS + 8
    out PIC2 + 1, al
    mov al, 1 << 2
    out PIC1 + 1, al
    mov al, 2
    out PIC2 + 1, al
    mov al, 1
    out PIC1 + 1, al
    out PIC2 + 1, al
    mov al, ~(1 << IRQ) & 0xFF      ; the mask: only our line is open
    out PIC1 + 1, al
    mov al, 0xFF
    out PIC2 + 1, al

    ; In real mode the vector table is at 0: four bytes each, offset and segment.
    mov word [VECTOR * 4], handler
    mov word [VECTOR * 4 + 2], 0

    mov bp, numbers
.next:
    mov eax, [bp]
    test eax, eax
    jz finished
    mov byte [woken], 0
    ; ANCHOR: sleep
    mov [fs:OPERAND], eax
    mov dword [fs:DOORBELL], 1

    ; STI takes effect after the next instruction, so no interrupt can come between it and HLT, which
    ; would then sleep forever. With the interrupt controllers in the kernel, HLT doesn't exit.
.sleep:
    cli
    cmp byte [woken], 0
    jne .awake
    sti
..@asleep:
    hlt
    jmp .sleep
    ; ANCHOR_END: sleep

.awake:
    mov ax, [row]
    imul di, ax, 160
    inc word [row]
    mov si, root_of
    mov ah, 0x07
    call print
    mov eax, [bp]
    mov dh, 0x07
    call print_decimal
    mov si, is
    mov ah, 0x07
    call print
    mov eax, [result]
    mov dh, 0x0E
    call print_decimal
    add bp, 4
    jmp .next

finished:
    ; The device has taken the acknowledgements: nothing is pending.
    cmp dword [fs:STATUS], 0
    jne wrong
    imul di, [row], 160
    mov si, interrupts
    mov ah, 0x07
    call print
    mov eax, [count]
    mov dh, 0x0A
    call print_decimal
    END_WELL

; The interrupt: take the result, acknowledge it to the device, so that it releases its line, and to the
; interrupt controller, so that it lets the next one through.
;
; An emulated SVM can lose STI's delay when it exits at the wrong moment (lab/README.md, "Limits"): the interrupt
; then does come before HLT. It returns behind it in that case, for no second one will follow.
handler:
    push bp
    mov bp, sp
    cmp word [bp + 2], ..@asleep
    jne .return
    inc word [bp + 2]               ; HLT is one byte long
.return:
    pop bp
    push eax
    mov eax, [fs:RESULT]
    mov [result], eax
    mov dword [fs:STATUS], DONE
    mov byte [woken], 1
    inc dword [count]
    mov al, EOI
    out PIC1, al
    pop eax
    iret

missing:
    mov si, no_device
    jmp fail
wrong:
    mov si, still_pending
fail:
    xor di, di
    mov ah, 0x0C
    call print
    END_BADLY

SCREEN_ROUTINES

root_of:        db "The root of ", 0
is:             db " is ", 0
interrupts:     db "Interrupts taken: ", 0
no_device:      db "No square root coprocessor at 0xD0000.", 0
still_pending:  db "The device did not take the last acknowledgement.", 0

align 4
numbers:        dd 144, 1000000, 2, 4294967295, 0
result:         dd 0
count:          dd 0
row:            dw 0
woken:          db 0
