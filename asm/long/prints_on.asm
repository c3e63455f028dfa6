; A kernel that prints one newline after the other: wherever it is stopped, and saved, the next one tells that it goes on.
%include "vmlinux.inc"

entry:
    mov dx, 0x3F8                   ; COM1
    mov al, 10
.print:
    out dx, al
    jmp .print
end:
