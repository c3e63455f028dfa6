; An INT from ring 3, with nothing in TR: there is no stack for the kernel.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    lgdt [gdt_pointer]
    lidt [idt_pointer]
    GATE 0x80, handler, 0, 3
    ; The first 2 MiB are for ring 3 as well.
    or qword [0x9000], USER
    or qword [0xA000], USER
    or qword [0xB000], USER
    mov rax, cr3
    mov cr3, rax
    mov rsp, STACK_TOP
    push USER_DATA
    push 0x18000
    push 2
    push USER_CODE
    push user
    iretq
user:
    int 0x80
handler:
    iretq
    TABLES
