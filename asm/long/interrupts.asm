; Interrupts: the timer (PIT) ticks through the interrupt controllers (PICs), all three inside KVM, and
; wakes the processor out of HLT ten times.
bits 64
org 0x1000

%include "modes.inc"
%include "long.inc"

; How many ticks there were, for the host to read.
TICKS       equ RECORDS
WANTED      equ 10

TIMER_VECTOR equ 32

PIC1        equ 0x20
PIC1_DATA   equ 0x21
PIC2        equ 0xA0
PIC2_DATA   equ 0xA1
END_OF_INTERRUPT equ 0x20

PIT_CHANNEL0 equ 0x40
PIT_MODE    equ 0x43
DIVISOR     equ 11932           ; of 1193182 Hz: 100 Hz

%macro OUTB 2
    mov al, %2
    out %1, al
%endmacro

    LOAD_TABLES
    mov qword [TICKS], 0
    GATE TIMER_VECTOR, tick, 0, 0
    GATE TIMER_VECTOR + 7, spurious, 0, 0

    ; The PICs wake up with vectors 8 to 15, which are the processor's own exceptions: move them to 32.
    ; (Intel 8259A data sheet, the initialization command words.)
    OUTB PIC1, 0x11             ; ICW1: begin, ICW4 will come
    OUTB PIC2, 0x11
    OUTB PIC1_DATA, TIMER_VECTOR        ; ICW2: the first vector
    OUTB PIC2_DATA, TIMER_VECTOR + 8
    OUTB PIC1_DATA, 1 << 2      ; ICW3: the second PIC hangs on line 2
    OUTB PIC2_DATA, 2
    OUTB PIC1_DATA, 1           ; ICW4: 8086 mode
    OUTB PIC2_DATA, 1
    OUTB PIC1_DATA, ~(1 << 0) & 0xFF    ; all lines masked but the timer's
    OUTB PIC2_DATA, 0xFF

    ; Channel 0 of the timer: rate generator, low byte, then high byte. (Intel 8254 data sheet.)
    OUTB PIT_MODE, 0x34
    OUTB PIT_CHANNEL0, DIVISOR & 0xFF
    OUTB PIT_CHANNEL0, DIVISOR >> 8

    SAY "waiting for ten ticks, in HLT: "
.wait:
    ; STI holds interrupts back for one more instruction, so none is lost between the two.
    sti
    hlt
    cli
    cmp qword [TICKS], WANTED
    jb .wait
    SAY 13, 10, "ten ticks at 100 a second; HLT never reached the monitor", 13, 10
    END 0

tick:
    push rax
    push rcx
    push rdx
    push rsi
    inc qword [TICKS]
    SAY "."
    OUTB PIC1, END_OF_INTERRUPT
    pop rsi
    pop rdx
    pop rcx
    pop rax
    iretq

; A request that went away again before the processor took it; it wants no end of interrupt.
spurious:
    iretq

    TABLES
