; A boot sector that calls the BIOS as it is told and notes what comes back: a list at 0x10000 of interrupts with flags
; and registers, which become those afterwards. Number 0 ends it, and the machine.
bits 16
org 0x7C00

%include "ports.inc"

STACK       equ 0x0060          ; its segment, which is none of the BIOS's
STACK_TOP   equ 0x1000
LIST        equ 0x1000          ; its segment
struc CALL
.number     resw 1
.flags      resw 1
.eax        resd 1
.ebx        resd 1
.ecx        resd 1
.edx        resd 1
.esi        resd 1
.edi        resd 1
.ebp        resd 1
.ds         resw 1
.es         resw 1
endstruc

    mov ax, STACK
    mov ss, ax
    mov sp, STACK_TOP
    mov ax, LIST
    mov gs, ax                  ; no service may change it
next:
    mov bx, [cs:call_at]
    mov al, [gs:bx + CALL.number]
    test al, al
    jz end
    mov [cs:service + 1], al
    mov eax, [gs:bx + CALL.eax]
    mov ecx, [gs:bx + CALL.ecx]
    mov edx, [gs:bx + CALL.edx]
    mov esi, [gs:bx + CALL.esi]
    mov edi, [gs:bx + CALL.edi]
    mov ebp, [gs:bx + CALL.ebp]
    mov ds, [gs:bx + CALL.ds]
    mov es, [gs:bx + CALL.es]
    push word [gs:bx + CALL.flags]
    popf
    mov ebx, [gs:bx + CALL.ebx]
    jmp service                 ; the processor must fetch it anew
service:
    int 0
    pushf
    push ebx
    mov bx, [cs:call_at]
    pop dword [gs:bx + CALL.ebx]
    pop word [gs:bx + CALL.flags]
    mov [gs:bx + CALL.eax], eax
    mov [gs:bx + CALL.ecx], ecx
    mov [gs:bx + CALL.edx], edx
    mov [gs:bx + CALL.esi], esi
    mov [gs:bx + CALL.edi], edi
    mov [gs:bx + CALL.ebp], ebp
    mov [gs:bx + CALL.ds], ds
    mov [gs:bx + CALL.es], es
    add word [cs:call_at], CALL_size
    jmp next

end:
    mov al, 0
    cmp sp, STACK_TOP           ; nor where the stack is
    je .well
    inc al
.well:
    out DEBUG_EXIT, al
    jmp $

call_at dw 0

    times 510 - ($ - $$) db 0
    dw 0xAA55
