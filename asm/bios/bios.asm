; The BIOS: the program in a PC's ROM, which runs before any other and stays to serve it.
;
; 64 KiB, at the end of the first megabyte and, the same bytes again, at the end of the first 4 GiB, where a
; processor takes its first instruction after reset: 16 bytes below the end.
;
; It has two lives. The first is `post`: it finds out what the machine has, gives every device a state to begin with,
; fills the vector table at 0 and the data areas at 0x400 and 0x9FC00, and jumps into the first sector of a disk. From
; then on it is a library: a program calls it by `int`, which goes by the vector table, and so do the interrupts of
; the timer and the keyboard. One file a service; each begins with what it does, and each function with its
; number and its registers.
;
; What a service has to do is nowhere laid down as a whole. It is what IBM's PC, XT and AT did, and what came since:
;   IBM, "Personal Computer AT Technical Reference" (1984), with the BIOS's listing
;   IBM, "PS/2 and PC BIOS Interface Technical Reference" (1991)
;   Compaq, Phoenix, Intel, "BIOS Boot Specification" 1.01 (1996): int 18h and 19h
;   T13/1572D, "BIOS Enhanced Disk Drive Services - 3" (EDD-3): int 13h, 41h to 48h
;   Intel, Microsoft, "Advanced Power Management" 1.2 (1996): int 15h, 53h
;   UEFI Forum, "ACPI" 6.5, 15.1: int 15h, E820h
;   Ralf Brown's Interrupt List (2000): all of it, and what programs make of it
bits 16
org 0

BIOS        equ 0xF000          ; our segment

%include "ports.inc"
%include "ata.inc"
%include "data.inc"             ; our memory: the data areas, and the CMOS's registers
%include "frame.inc"            ; how a service is entered and left

; The first life.
%include "post.inc"             ; what happens from reset to the first sector of a disk
%include "memory.inc"           ; how much memory there is, and where
%include "drives.inc"           ; which drives there are
%include "int19.inc"            ; boot (and int 18h: the next one, please)

; Interrupts of the hardware.
%include "irq.inc"              ; their controllers, the timer; exceptions
%include "int09.inc"            ; the keyboard

; Services.
%include "int10.inc"            ; the screen, and its copy on the serial port
%include "int11.inc"            ; what there is (and int 12h: memory below 640 KiB)
%include "int13.inc"            ; disks: by cylinders, heads and sectors,
%include "int13_extended.inc"   ; and by linear addresses;
%include "transfer.inc"         ; sectors to and from them
%include "int14.inc"            ; serial ports (and int 17h: no printers)
%include "int15.inc"            ; the memory map and other services of the AT,
%include "apm.inc"              ; of which turning it off is one
%include "int16.inc"            ; keys
%include "int1a.inc"            ; the time

%include "mp.inc"               ; room for the machine's own description of its processors

    times 0xFFF0 - ($ - $$) db 0xFF
; ANCHOR: reset
; 0xFFFFFFF0. CS's base is 0xFFFF0000 here, which no selector of real mode can say: the first far jump loads
; CS and goes on in the copy below 1 MiB. (Intel SDM vol. 3, 11.1.4.)
    jmp BIOS:post
    db "11/22/26"               ; the ROM's date, where programs look for it
    db 0
    db 0xFC                     ; the model: a PC AT
; ANCHOR_END: reset
    db 0
