; The BIOS: the program in a PC's ROM, which runs before any other and stays to serve it.
;
; 64 KiB, at the end of the first megabyte and, the same bytes again, at the end of the first 4 GiB, where a
; processor takes its first instruction after reset: 16 bytes below the end. One file a service; an
; `int` finds it by the vector table at address 0.
bits 16
org 0

BIOS        equ 0xF000          ; our segment

%include "ports.inc"
%include "ata.inc"
%include "data.inc"
%include "frame.inc"

%include "post.inc"             ; what happens from reset to the first sector of a disk
%include "memory.inc"           ; how much memory there is, and where
%include "irq.inc"              ; the interrupt controllers, the timer; exceptions
%include "int09.inc"            ; the keyboard's interrupt
%include "int10.inc"            ; the screen, and its copy on the serial port
%include "int11.inc"            ; what there is (and int 12h: memory below 640 KiB)
%include "drives.inc"           ; which drives there are
%include "transfer.inc"         ; sectors to and from them
%include "int13.inc"            ; disks: by cylinders, heads and sectors,
%include "int13_extended.inc"   ; and by linear addresses
%include "int14.inc"            ; serial ports (and int 17h: no printers)
%include "int15.inc"            ; the memory map and other services of the AT,
%include "apm.inc"              ; of which turning it off is one
%include "int16.inc"            ; keys
%include "int19.inc"            ; boot (and int 18h: nothing to boot)
%include "int1a.inc"            ; the time
%include "mp.inc"               ; room for the machine's own description of its processors

    times 0xFFF0 - ($ - $$) db 0xFF
; 0xFFFFFFF0. CS's base is 0xFFFF0000 here, which no selector of real mode can say: the first far jump loads
; CS and goes on in the copy below 1 MiB. (Intel SDM vol. 3, 11.1.4.)
    jmp BIOS:post
    db "11/22/26"               ; the ROM's date, where programs look for it
    db 0
    db 0xFC                     ; the model: a PC AT
    db 0
