; Sends back what the serial port receives, until Ctrl-D comes.
bits 16
org 0x1000
%include "ports.inc"

END     equ 0x04                ; Ctrl-D

next:
    mov dx, SERIAL_STATUS
wait_for_byte:
    in al, dx
    test al, DATA_READY
    jz wait_for_byte
    mov dx, SERIAL_DATA
    in al, dx
    cmp al, END
    je end
    call put_char
    jmp next
end:
    EXIT_WELL

%include "print.inc"
