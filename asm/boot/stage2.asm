; The second stage: from real mode to a 64-bit kernel that it has read from the disk.
;
;   1. the A20 gate, and how much memory there is
;   2. page tables, GDT, long mode
;   3. the kernel's ELF file, from the disk to a buffer
;   4. its segments, from the buffer to where they belong
;   5. the boot info, and the jump (the contract: guests/kernel/abi/src/boot.rs)
bits 16

%include "ata.inc"
%include "disk.inc"
%include "modes.inc"
%include "ports.inc"

org STAGE2

; Memory of ours, all of it below 32 KiB, where neither the boot sector nor we are.
PML4        equ 0x1000          ; three tables, each a page
PDPT        equ 0x2000
PD          equ 0x3000
TABLES_END  equ 0x4000
BOOT_INFO   equ 0x5000          ; 24 bytes
E820        equ 0x5020          ; 24 bytes for each range

; The kernel's file is read to 2 MiB and may have up to 2 MiB; its segments belong between 1 and 2 MiB.
FILE        equ 0x200000
FILE_MAX    equ 0x200000
KERNEL      equ 0x100000
KERNEL_END  equ 0x200000
LEAST_MEMORY equ 8              ; MiB

; The contract's numbers.
LOADER_DISK equ 3

; ELF64: the file's header and a program header.
E_TYPE      equ 16              ; this and e_machine, the next field: a program for x86-64
E_ENTRY     equ 24
E_PHOFF     equ 32
E_PHENTSIZE equ 54
E_PHNUM     equ 56
ELF_HEADER  equ 64
P_TYPE      equ 0
P_OFFSET    equ 8
P_PADDR     equ 24
P_FILESZ    equ 32
P_MEMSZ     equ 40
P_LENGTH    equ 56
PT_LOAD     equ 1

    ; The header, which the image's builder fills.
    dd BOOT_MAGIC
    times HDR_LENGTH - 4 db 0

    mov si, hello
    call put_text

    ; A20. The 8086 had 20 address lines and wrapped around at 1 MiB; PCs since the AT have a gate that
    ; keeps the 21st at 0 until somebody asks. If 0xFFFF:0x0510 is the same byte as 0:0x0500, it is shut.
    ; (Intel SDM vol. 3, 22.1.1; port 0x92 is the "fast" way since the PS/2.)
    mov ax, 0xFFFF
    mov fs, ax
    call a20_is_open
    jne .open
    in al, 0x92
    or al, 2
    and al, 0xFE                ; bit 0 resets the machine
    out 0x92, al
    call a20_is_open
    mov si, no_a20
    je fail
.open:

    ; Memory, as the firmware has left it in the CMOS: what is above 16 MiB in units of 64 KiB, or what is
    ; above 1 MiB in KiB. The BIOS's memory map (int 15h, E820h) would say more.
    mov al, 0x35
    call read_cmos
    mov ah, al
    mov al, 0x34
    call read_cmos
    movzx eax, ax
    test eax, eax
    jz .little
    add eax, 16 << 4
    shl eax, 6                  ; to KiB
    jmp .known
.little:
    mov al, 0x31
    call read_cmos
    mov ah, al
    mov al, 0x30
    call read_cmos
    movzx eax, ax
    add eax, 1 << 10
.known:
    mov [memory], eax
    mov si, little_memory
    cmp eax, LEAST_MEMORY << 10
    jb fail

    ; The first GiB mapped to itself: one table of each kind, the last with 512 pages of 2 MiB.
    mov edi, PML4
    mov ecx, (TABLES_END - PML4) / 4
    xor eax, eax
    rep stosd
    mov dword [PML4], PDPT | PRESENT | WRITABLE
    mov dword [PDPT], PD | PRESENT | WRITABLE
    mov di, PD
    mov eax, 0 | PRESENT | WRITABLE | LARGE
.page:
    mov [di], eax
    add di, 8
    add eax, 2 << 20
    cmp di, TABLES_END
    jb .page

    ; Long mode without a stop in protected mode: PE and PG may be set together, when the tables, PAE and LME
    ; are there. (AMD APM vol. 2, 14.6; stage 06 climbs step by step.)
    mov si, climbing
    call put_text
    mov eax, cr4
    or eax, CR4_PAE
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    lgdt [gdt_pointer]
    lidt [no_idt]               ; an exception from here on is a triple fault
    mov eax, cr0
    or eax, CR0_PE | CR0_PG
    mov cr0, eax
    jmp CODE64:long_mode

; Sets the zero flag if the A20 gate is shut.
a20_is_open:
    mov byte [0x500], 0
    mov byte [fs:0x510], 1      ; 0x100500
    cmp byte [0x500], 1
    ret

; Reads CMOS register AL.
read_cmos:
    out 0x70, al
    in al, 0x71
    ret

fail:
    call put_text
    mov al, 1
    out DEBUG_EXIT, al
.halt:
    hlt
    jmp .halt

%include "print_text.inc"

bits 64
long_mode:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, STAGE2

    ; The file, sector by sector.
    mov rsi, bad_size
    mov ebp, [STAGE2 + HDR_SIZE]
    cmp ebp, ELF_HEADER
    jb fail_64
    cmp ebp, FILE_MAX
    ja fail_64
    add ebp, 511
    shr ebp, 9
    mov eax, [STAGE2 + HDR_LBA]
    mov edi, FILE
.read:
    call read_sector
    mov rsi, unreadable
    jc fail_64
    dec ebp
    jnz .read

    mov ecx, edi
    sub ecx, FILE
    shr ecx, 2
    mov ebx, [STAGE2 + HDR_KSUM]
    mov esi, FILE
.sum:
    lodsd
    add ebx, eax
    dec ecx
    jnz .sum
    test ebx, ebx
    mov rsi, bad_sum
    jnz fail_64

    ; Is it what it should be? Nothing in the file is believed, sums cannot overflow: all is checked
    ; against limits before it is added.
    mov rsi, no_elf
    cmp dword [FILE], 0x464C457F            ; 7F 'E' 'L' 'F'
    jne fail_64
    cmp word [FILE + 4], 0x0102             ; 64 bits, little-endian
    jne fail_64
    cmp dword [FILE + E_TYPE], 62 << 16 | 2 ; x86-64, an executable
    jne fail_64
    cmp word [FILE + E_PHENTSIZE], P_LENGTH
    jne fail_64
    mov rsi, bad_elf
    mov ebp, [STAGE2 + HDR_SIZE]
    mov r8, [FILE + E_PHOFF]
    cmp r8, rbp
    ja fail_64
    movzx r9d, word [FILE + E_PHNUM]
    test r9d, r9d
    jz fail_64
    imul eax, r9d, P_LENGTH
    add rax, r8
    cmp rax, rbp
    ja fail_64
    add r8, FILE                ; the program header in turn
    xor r10d, r10d              ; whether a segment holds the entry point

.segment:
    cmp dword [r8 + P_TYPE], PT_LOAD
    jne .next
    mov rax, [r8 + P_FILESZ]
    mov rdx, [r8 + P_MEMSZ]
    cmp rdx, KERNEL_END - KERNEL
    ja fail_64
    cmp rax, rdx
    ja fail_64
    mov rbx, [r8 + P_OFFSET]
    cmp rbx, rbp
    ja fail_64
    lea rcx, [rbx + rax]
    cmp rcx, rbp
    ja fail_64
    mov rdi, [r8 + P_PADDR]
    cmp rdi, KERNEL
    jb fail_64
    cmp rdi, KERNEL_END
    ja fail_64
    lea rcx, [rdi + rdx]
    cmp rcx, KERNEL_END
    ja fail_64
    mov r11, [FILE + E_ENTRY]
    cmp r11, rdi
    jb .copy
    cmp r11, rcx
    jae .copy
    inc r10d
.copy:
    mov rcx, rax
    lea rsi, [FILE + rbx]
    rep movsb
    mov rcx, rdx                ; what the file doesn't have is zero
    sub rcx, rax
    xor eax, eax
    rep stosb
    mov rsi, bad_elf
.next:
    add r8, P_LENGTH
    dec r9d
    jnz .segment
    test r10d, r10d
    jz fail_64

    ; What the kernel wants to know: 640 KiB without the firmware's last one, and all from 1 MiB on.
    mov edi, BOOT_INFO
    mov rax, 'mini-kvm'
    stosq
    mov eax, E820
    stosq
    mov eax, 2                  ; entries
    stosd
    mov eax, LOADER_DISK
    stosd
    mov edi, E820
    xor eax, eax
    stosq
    mov eax, 0x9FC00
    stosq
    mov eax, 1                  ; RAM
    stosq
    mov eax, 1 << 20
    stosq
    mov eax, [memory]
    sub eax, 1 << 10
    shl rax, 10
    stosq
    mov eax, 1
    stosq

    mov rsi, entering
    call put_text_64
    mov edi, BOOT_INFO
    jmp [FILE + E_ENTRY]

fail_64:
    call put_text_64
    mov al, 1
    out DEBUG_EXIT, al
.halt:
    hlt
    jmp .halt

; Prints the text at RSI up to its 0. Changes RSI, RAX and RDX.
put_text_64:
    mov dx, SERIAL_STATUS
.full:
    in al, dx
    test al, THR_EMPTY
    jz .full
    lodsb
    test al, al
    jz .end
    mov dx, SERIAL_DATA
    out dx, al
    jmp put_text_64
.end:
    ret

READ_SECTOR

hello       db "stage 2: A20, memory, page tables", 13, 10, 0
no_a20      db "stage 2: the A20 gate does not open", 13, 10, 0
little_memory db "stage 2: less than 8 MiB of memory", 13, 10, 0
climbing    db "stage 2: to long mode", 13, 10, 0
bad_size    db "stage 2: the kernel's length makes no sense", 13, 10, 0
unreadable  db "stage 2: the disk cannot be read", 13, 10, 0
bad_sum     db "stage 2: the kernel's checksum is wrong", 13, 10, 0
no_elf      db "stage 2: the kernel is no ELF64 file for x86-64", 13, 10, 0
bad_elf     db "stage 2: the kernel's segments make no sense", 13, 10, 0
entering    db "stage 2: entering the kernel", 13, 10, 0

    align 8
gdt:
    dq 0
    dq 0x00AF9B000000FFFF       ; code, ring 0, 64 bits
    dq 0x00CF93000000FFFF       ; data
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
no_idt:
    dw 0
    dd 0
CODE64      equ 0x08
DATA        equ 0x10

memory      dd 0                ; KiB from 0 on
