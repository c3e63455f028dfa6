; Exceptions: this guest does six things that a processor refuses, and a handler says what came of each.
; (Intel SDM vol. 3, chapter 7.)
bits 64
org 0x1000

%include "modes.inc"
%include "long.inc"

; What the handler saw of each: vector, error code, RIP, CR2, 64 bits wide; before the first, their
; number.
COUNT       equ RECORDS
FIRST       equ RECORDS + 32
RECORD_SIZE equ 32

; Nothing is mapped there: the first tables end at 4 GiB.
UNMAPPED    equ 0x4000000000

; TRY code: runs it, and goes on behind it when the handler returns.
%macro TRY 1+
    mov qword [resume], %%after
    mov [resume_rsp], rsp
    %1
%%after:
%endmacro

    LOAD_TABLES
    mov qword [COUNT], 0

    GATE 0, divide_error, 0, 0
    GATE 3, breakpoint, 0, 0
    GATE 6, invalid_opcode, 0, 0
    GATE 8, double_fault, 1, 0  ; on a stack of its own: IST 1
    GATE 13, general_protection, 0, 0
    GATE 14, page_fault, 0, 0

    SAY "dividing by zero", 13, 10
    xor edx, edx
    xor ecx, ecx
    TRY div ecx

    SAY "a breakpoint", 13, 10
    TRY int3

    SAY "an instruction that does not exist", 13, 10
    TRY ud2

    SAY "loading a segment beyond the end of the GDT", 13, 10
    mov eax, 0x1230
    TRY mov ds, ax

    SAY "writing where nothing is mapped", 13, 10
    mov rbx, UNMAPPED
    TRY mov [rbx], al

    ; ANCHOR: double_fault
    ; The processor cannot push the exception's frame, which is a page fault, whose frame it cannot push
    ; either: a double fault. Without a stack of its own this would be a triple fault, and the end.
    SAY "an exception while there is no stack", 13, 10
    mov qword [resume], .after
    mov [resume_rsp], rsp
    mov rsp, UNMAPPED
    ud2
.after:
    ; ANCHOR_END: double_fault

    SAY "all six caught, and still running", 13, 10
    END 0

; The processor does not say which vector it came by, hence an entry for each; and it pushes an error
; code for some exceptions, hence a zero for the others.
%macro ENTRY 4                  ; label, vector, whether there is an error code, name
%1:
%if %3 == 0
    push 0
%endif
    push %2
    push rax
    push rcx
    push rdx
    push rsi
    SAY "  caught ", %4, 13, 10
    jmp report
%endmacro

ENTRY divide_error, 0, 0, "vector 0, divide error (#DE)"
ENTRY breakpoint, 3, 0, "vector 3, breakpoint (#BP)"
ENTRY invalid_opcode, 6, 0, "vector 6, invalid opcode (#UD)"
ENTRY double_fault, 8, 1, "vector 8, double fault (#DF)"
ENTRY general_protection, 13, 1, "vector 13, general protection (#GP)"
ENTRY page_fault, 14, 1, "vector 14, page fault (#PF)"

; On the stack: RSI, RDX, RCX, RAX, vector, error code, and then the processor's own: RIP, CS, RFLAGS,
; RSP, SS.
report:
    mov rsi, [COUNT]
    inc qword [COUNT]
    shl rsi, 5
    add rsi, FIRST
    mov rax, [rsp + 32]
    mov [rsi], rax
    mov rax, [rsp + 40]
    mov [rsi + 8], rax
    mov rax, [rsp + 48]
    mov [rsi + 16], rax
    mov rax, cr2
    mov [rsi + 24], rax

    push rsi
    SAY "    error code "
    pop rsi
    push rsi
    mov rax, [rsi + 8]
    call print_hex
    SAY ", rip "
    pop rsi
    push rsi
    mov rax, [rsi + 16]
    call print_hex
    SAY ", cr2 "
    pop rsi
    mov rax, [rsi + 24]
    call print_hex
    SAY 13, 10

    pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 16                 ; vector and error code
    ; Behind what failed, not at it again; on the stack as it was.
    push rax
    mov rax, [resume]
    mov [rsp + 8], rax
    mov rax, [resume_rsp]
    mov [rsp + 8 + 24], rax
    pop rax
    iretq

PRINT_HEX

    align 8
resume:
    dq 0
resume_rsp:
    dq 0
    TABLES
