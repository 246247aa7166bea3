# The probe guest: a boot sector that does what kernels do first. It turns on paging and 64-bit
# mode, touches memory and SSE, takes a page fault and returns from it, and says so on COM1.
#
#   as guest.S -o guest.o && ld --oformat binary -Ttext 0x7c00 -e start guest.o -o guest.bin

        .code16
        .globl start
start:  cli
        xorl %eax, %eax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        cld
        movw $0x1000, %di               # page tables: 0x1000 -> 0x2000 -> 0x3000
        movw $0x1000, %cx
        rep stosl                       # clears 0x1000 to 0x5000
        movw $0x2003, 0x1000
        movw $0x3003, 0x2000
        movw $0x0083, 0x3000            # the first 2 MiB, as one page
        movl %cr4, %eax
        orl $0x620, %eax                # PAE, FXSR, SSE exceptions
        movl %eax, %cr4
        movl $0x1000, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx          # EFER
        rdmsr
        orl $0x100, %eax                # long mode
        wrmsr
        lgdtl gdt_pointer
        movl %cr0, %eax
        andl $0xfffffffb, %eax          # no FPU emulation
        orl $0x80000003, %eax           # paging, protection
        movl %eax, %cr0
        ljmpl $0x08, $long

        .code64
long:   movl $0x10, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %ss
        movl $0x7c00, %esp
        movl $fault, %eax               # entry 14 of the IDT at 0x4000
        movw %ax, 0x4000+14*16
        movw $0x08, 0x4000+14*16+2
        movw $0x8e00, 0x4000+14*16+4
        lidt idt_pointer
        xorl %eax, %eax
        cpuid
        movl $0x100000, %edi            # memory above 1 MiB
        movl $0x5a5a5a5a, %eax
        movl $0x1000, %ecx
        rep stosl
        movups 0x100000, %xmm0
        paddd %xmm0, %xmm0
        movups %xmm0, 0x100010
        cmpl $0xb4b4b4b4, 0x100010
        jne stop
        movl $0x40000000, %ebx          # not mapped
probe:  movb (%rbx), %al
        jmp stop
fault:  addq $8, %rsp                   # the error code
        movq $back, (%rsp)
        iretq
back:   movl $text, %esi
next:   lodsb
        testb %al, %al
        jz stop
        movb %al, %ah
        movw $0x3fd, %dx
ready:  inb %dx, %al
        testb $0x20, %al
        jz ready
        movb %ah, %al
        movw $0x3f8, %dx
        outb %al, %dx
        jmp next
stop:   hlt
        jmp stop

text:   .asciz "stackhand probe guest ran\n"
        .balign 8
gdt:    .quad 0
        .quad 0x00209a0000000000
        .quad 0x0000920000000000
gdt_pointer:
        .word . - gdt - 1
        .long gdt
idt_pointer:
        .word 0xff
        .quad 0x4000
        .org 510
        .word 0xaa55
