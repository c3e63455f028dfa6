; Ends the virtual machine by a triple fault. An invalid opcode is exception 6; its handler would be
; entry 6 of the interrupt descriptor table, which is empty here: that is a #GP (13), which has no
; handler either: a double fault (8), which has none: the processor gives up.
; (Intel SDM vol. 3, 7.15 "Interrupt 8, Double Fault Exception"; AMD APM vol. 2, 8.2.9.)
bits 16
org 0x1000

; ANCHOR: all
    lidt [no_table]
    mov eax, cr0
    or al, 1                    ; protected mode: vectors come from the IDT, checked against its limit
    mov cr0, eax
    ud2

no_table:
    dw 0                        ; limit: not even one entry
    dd 0                        ; base
; ANCHOR_END: all
