; A kernel with a Multiboot header (specification 0.6.96) that says what its loader has told it, and whether the
; machine is in the state that the specification promises.
bits 32
org 0x100000

FLAGS       equ 1 << 0 | 1 << 1 | HAS_ADDRESSES ; modules at pages, the memory's sizes
%include "multiboot.inc"

MAGIC       equ 0x2BADB002
struc INFO
.flags      resd 1
.mem_lower  resd 1
.mem_upper  resd 1
.boot_device resd 1
.cmdline    resd 1
.mods_count resd 1
.mods_addr  resd 1
.syms       resd 4
.mmap_length resd 1
.mmap_addr  resd 1
.drives     resd 2
.config     resd 1
.loader     resd 1
endstruc

EFLAGS_IF   equ 1 << 9
EFLAGS_VM   equ 1 << 17

entry:
    mov esp, stack_top
    mov [got_eax], eax
    mov [got_ebx], ebx
    pushfd
    pop eax
    mov edx, cr0
    test eax, EFLAGS_IF | EFLAGS_VM
    mov esi, .bad_flags
    jnz .bad
    and edx, CR0_PE | CR0_PG
    cmp edx, CR0_PE
    mov esi, .bad_cr0
    jne .bad
    cmp dword [got_eax], MAGIC
    mov esi, .bad_magic
    jne .bad
    xor eax, eax                ; behind the file's bytes all is clear
    mov edi, end
    mov ecx, 0x1000 / 4        ; up to the stack
    repe scasd
    mov esi, .bad_bss
    jne .bad
    lgdt [gdt.pointer]          ; its own descriptors, as it must before it names one
    pushfd                      ; xv6 names none at first: its first interrupts return by the loader's selectors,
    push cs                     ; into its own descriptors
    push .returned
    iretd
.returned:
    push ds
    pop ds
    jmp 0x08:.reloaded
.reloaded:
    LOAD_DATA_SEGMENTS

    mov ebx, [got_ebx]
    PRINT "flags "
    mov eax, [ebx + INFO.flags]
    call print_hex
    PRINT 10, "lower "
    mov eax, [ebx + INFO.mem_lower]
    call print_hex
    PRINT 10, "upper "
    mov eax, [ebx + INFO.mem_upper]
    call print_hex
    PRINT 10, "loader "
    mov esi, [ebx + INFO.loader]
    call print
    PRINT 10, "cmdline "
    mov esi, [ebx + INFO.cmdline]
    call print
    mov ebp, [ebx + INFO.mmap_addr]
    mov ebx, [ebx + INFO.mmap_length]
    add ebx, ebp
.range:
    cmp ebp, ebx
    jae .told
    PRINT 10, "range "
    mov eax, [ebp + 8]
    call print_hex
    mov eax, [ebp + 4]
    call print_hex
    PRINT " "
    mov eax, [ebp + 16]
    call print_hex
    mov eax, [ebp + 12]
    call print_hex
    PRINT " "
    mov eax, [ebp + 20]
    call print_hex
    add ebp, [ebp]
    add ebp, 4
    jmp .range
.told:
    PRINT 10
    END_WELL
    jmp $
.bad:
    call print
    END_BADLY
    jmp $
.bad_flags  db "interrupts are on, or this is virtual 8086 mode", 10, 0
.bad_cr0    db "this is not protected mode without paging", 10, 0
.bad_magic  db "EAX is not 2BADB002", 10, 0
.bad_bss    db "what is behind the file's bytes is not clear", 10, 0

; Prints EAX in hexadecimal. Changes EAX, ECX, EDX.
print_hex:
    mov ecx, 8
    mov edx, COM1
.digit:
    rol eax, 4
    push eax
    and al, 0x0F
    cmp al, 10
    jb .below_ten
    add al, "a" - "0" - 10
.below_ten:
    add al, "0"
    out dx, al
    pop eax
    loop .digit
    ret

    align 4
got_eax     dd 0
got_ebx     dd 0
end:

; Not in the file.
bss_end     equ end + 0x2000
stack_top   equ bss_end
