; Greets by the serial port, byte by byte, and ends with HLT.
bits 16
org 0x1000
%include "ports.inc"

    mov si, greeting
    call put_text
    hlt

greeting:
    db "Hello from a virtual machine!", 10
    db "Each letter is an OUT to port 0x3F8, and each OUT an exit.", 10, 0

%include "print.inc"
