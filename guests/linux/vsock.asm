; A Linux program for the guest of stage 08: its input and output at the other end of a vsock connection (vsock(7)).
;
;     vsock PORT      connects to the host's port
;     vsock -l PORT   waits until the host connects to this port
;
; What it reads goes out; at the end of input it shuts that direction down, and goes on to print what comes in until the
; host has no more either. Two processes, for each direction may have to wait while the other goes on.
;
; An ELF file written by hand, for there is no C library in the guest: the kernel needs nothing but a program
; header.

bits 64
org 0x400000

ET_EXEC             equ 2
EM_X86_64           equ 62
PT_LOAD             equ 1
RWX                 equ 7

; System calls (Linux, arch/x86/entry/syscalls/syscall_64.tbl).
SYS_READ            equ 0
SYS_WRITE           equ 1
SYS_SOCKET          equ 41
SYS_CONNECT         equ 42
SYS_ACCEPT          equ 43
SYS_SHUTDOWN        equ 48
SYS_BIND            equ 49
SYS_LISTEN          equ 50
SYS_FORK            equ 57
SYS_EXIT            equ 60
SYS_WAIT4           equ 61

AF_VSOCK            equ 40
SOCK_STREAM         equ 1
SHUT_WR             equ 1
CID_HOST            equ 2
CID_ANY             equ 0xFFFFFFFF

BUFFER_SIZE         equ 64 * 1024

    db 0x7F, "ELF", 2, 1, 1, 0
    dq 0
    dw ET_EXEC, EM_X86_64
    dd 1
    dq start
    dq program_header - $$
    dq 0
    dd 0
    dw 64, 56, 1, 64, 0, 0

program_header:
    dd PT_LOAD, RWX
    dq 0, $$, $$
    dq file_end - $$, buffer + BUFFER_SIZE - $$
    dq 0x1000

; On the stack: how many arguments, the program's name, the arguments.
start:
    mov rsi, [rsp + 16]
    cmp dword [rsp], 2
    je .connect
    cmp dword [rsp], 3
    jne usage
    cmp word [rsi], '-l'
    jne usage
    cmp byte [rsi + 2], 0
    jne usage
    mov rsi, [rsp + 24]

.listen:
    call parse_port
    mov dword [address.cid], CID_ANY
    call socket
    mov eax, SYS_BIND
    call with_address
    mov eax, SYS_LISTEN
    mov edi, ebx
    mov esi, 1
    syscall
    test rax, rax
    js failed
    mov eax, SYS_ACCEPT
    mov edi, ebx
    xor esi, esi
    xor edx, edx
    syscall
    test rax, rax
    js failed
    mov ebx, eax
    jmp connected

.connect:
    call parse_port
    mov dword [address.cid], CID_HOST
    call socket
    mov eax, SYS_CONNECT
    call with_address

; EBX is the connection.
connected:
    mov eax, SYS_FORK
    syscall
    test rax, rax
    js failed
    jz .child
    mov edi, ebx
    mov ebp, 1
    call copy
    mov eax, SYS_WAIT4
    mov edi, -1
    xor esi, esi
    xor edx, edx
    xor r10d, r10d
    syscall
    jmp done
.child:
    xor edi, edi
    mov ebp, ebx
    call copy
    mov eax, SYS_SHUTDOWN
    mov edi, ebx
    mov esi, SHUT_WR
    syscall

done:
    xor edi, edi
exit:
    mov eax, SYS_EXIT
    syscall

; Copies from descriptor EDI to descriptor EBP until the end.
copy:
    mov r12d, edi
.read:
    xor eax, eax                    ; SYS_READ
    mov edi, r12d
    mov rsi, buffer
    mov edx, BUFFER_SIZE
    syscall
    test rax, rax
    js failed
    jz .end
    mov r13, rax
    mov rsi, buffer
.write:
    mov eax, SYS_WRITE
    mov edi, ebp
    mov rdx, r13
    syscall
    test rax, rax
    js failed
    add rsi, rax
    sub r13, rax
    jnz .write
    jmp .read
.end:
    ret

; A new socket in EBX.
socket:
    mov eax, SYS_SOCKET
    mov edi, AF_VSOCK
    mov esi, SOCK_STREAM
    xor edx, edx
    syscall
    test rax, rax
    js failed
    mov ebx, eax
    ret

; The system call EAX with the socket EBX and the address.
with_address:
    mov edi, ebx
    mov rsi, address
    mov edx, address_end - address
    syscall
    test rax, rax
    js failed
    ret

; Puts the decimal number at RSI into the address.
parse_port:
    xor eax, eax
    xor ecx, ecx
    mov cl, [rsi]
.digit:
    sub ecx, '0'
    cmp ecx, 9
    ja usage
    lea rax, [rax + rax * 4]
    lea rax, [rcx + rax * 2]
    mov rdx, rax
    shr rdx, 32
    jnz usage
    inc rsi
    movzx ecx, byte [rsi]
    test ecx, ecx
    jnz .digit
    mov [address.port], eax
    ret

usage:
    mov rsi, usage_text
    mov edx, usage_end - usage_text
    mov r12d, 2
    jmp complain

; RAX is an error number, negative.
failed:
    neg eax
    xor edx, edx
    mov ecx, 10
    mov rdi, error_end - 1
.digit:
    dec rdi
    div ecx
    add dl, '0'
    mov [rdi], dl
    xor edx, edx
    test eax, eax
    jnz .digit
    mov rsi, error_text
    mov edx, error_end - error_text
    mov r12d, 1

complain:
    mov eax, SYS_WRITE
    mov edi, 2
    syscall
    mov edi, r12d
    jmp exit

usage_text:
    db "usage: vsock [-l] PORT", 10
usage_end:

error_text:
    db "vsock: error number     ", 10
error_end:

; struct sockaddr_vm.
address:
    dw AF_VSOCK, 0
.port:
    dd 0
.cid:
    dd 0
    dd 0
address_end:

file_end:
buffer:
