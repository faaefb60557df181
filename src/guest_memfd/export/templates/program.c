/*
{% for line in about %}
 * {{ line }}
{% endfor %}
 *
 * The calls are made one after the other, in the order in which they begin in that run; what the kernel interleaves
 * within them cannot be asked for. Each prints its step, who makes it, and 0 or the errno.
 *
 *     cc -Wall -O1 -o calls calls.c && ./calls
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <linux/falloc.h>
#include <linux/kvm.h>

#define PAGE		4096UL
#define PAGES		{{ pages }}

enum what { ALLOCATE, PUNCH, TO_PRIVATE, TO_SHARED, BIND, UNBIND, MAP, UNMAP, TOUCH, RUN, CLOSE };

static const char *const names[] = {
	"allocate", "punch", "to_private", "to_shared", "bind", "unbind", "map", "unmap", "touch", "run", "close",
};

static const struct call {
	int step;
	const char *party;
	enum what what;
	long start, nr, gfn;
} calls[] = {
{% for call in calls %}
	{ {{ call.step }}, {{ call.party | c_string }}, {{ call.what | upper }}, {{ call.start }}, {{ call.nr }}, {{ call.gfn }} },
{% endfor %}
};

static const struct slot {
	long gfn, start, nr;
} slots[] = {
{% for slot in slots %}
	{ {{ slot.gfn }}, {{ slot.start }}, {{ slot.nr }} },
{% endfor %}
};

#define COUNT(table)	(sizeof(table) / sizeof((table)[0]))
#define MOST_SLOTS	64
#define CODE_GPA	0xf0000UL	/* above all slots of the scene */

/* Headers may be older than guest_memfd, so what it needs is here (include/uapi/linux/kvm.h). */
struct gmem_create {
	uint64_t size, flags, reserved[6];
};

struct gmem_region {
	uint32_t slot, flags;
	uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	uint32_t guest_memfd, pad1;
	uint64_t pad2[14];
};

struct gmem_attributes {		/* of a VM */
	uint64_t address, size, attributes, flags;
};

struct gmem_attributes2 {		/* of a file */
	uint64_t offset, size, attributes, flags, error_offset, reserved[11];
};

#define GMEM_CREATE		_IOWR(KVMIO, 0xd4, struct gmem_create)
#define GMEM_REGION		_IOW(KVMIO, 0x49, struct gmem_region)
#define GMEM_ATTRIBUTES		_IOW(KVMIO, 0xd2, struct gmem_attributes)
#define GMEM_ATTRIBUTES2	_IOWR(KVMIO, 0xd2, struct gmem_attributes2)
#define GMEM_CAP_FLAGS		244
#define GMEM_FLAG_MMAP		1UL
#define GMEM_FLAG_SHARED	2UL
#define GMEM_SLOT		4U
#define GMEM_PRIVATE		8UL

static int vm, file, vcpu = -1;
static char *mapped = MAP_FAILED, *window;
static struct kvm_run *running;
static struct slot bound[MOST_SLOTS];	/* nr 0: the slot is free */
static sigjmp_buf past_the_fault;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void on_fault(int number)
{
	siglongjmp(past_the_fault, number);
}

static int set_slot(unsigned int number, const struct slot *slot, unsigned long bytes)
{
	struct gmem_region region = {
		.slot = number, .flags = GMEM_SLOT, .guest_phys_addr = slot->gfn * PAGE, .memory_size = bytes,
		.userspace_addr = (uintptr_t)window + slot->start * PAGE, .guest_memfd = file,
		.guest_memfd_offset = slot->start * PAGE,
	};

	return ioctl(vm, GMEM_REGION, &region);
}

static int bind_pages(const struct call *call)
{
	struct slot slot = { call->gfn, call->start, call->nr };
	unsigned int number = 0;

	while (number < MOST_SLOTS && bound[number].nr)
		number++;
	if (number == MOST_SLOTS) {
		errno = ENOSPC;
		return -1;
	}
	if (set_slot(number, &slot, slot.nr * PAGE))
		return -1;
	bound[number] = slot;
	return 0;
}

/* KVM deletes slots and no part of one. */
static int unbind_pages(const struct call *call)
{
	for (unsigned int number = 0; number < MOST_SLOTS; number++) {
		if (!bound[number].nr || bound[number].start != call->start || bound[number].nr != call->nr)
			continue;
		if (set_slot(number, &bound[number], 0))
			return -1;
		bound[number].nr = 0;
		return 0;
	}
	errno = ENOENT;
	return -1;
}

/* The file's attributes where they are the file's, else the VM's. */
static int convert(const struct call *call, unsigned long attributes)
{
	struct gmem_attributes2 of_file = {
		.offset = call->start * PAGE, .size = call->nr * PAGE, .attributes = attributes,
	};
	struct gmem_attributes of_vm = {
		.address = call->gfn * PAGE, .size = call->nr * PAGE, .attributes = attributes,
	};

	if (ioctl(file, GMEM_ATTRIBUTES2, &of_file) == 0 || errno != ENOTTY)
		return errno ? -1 : 0;
	errno = 0;
	return ioctl(vm, GMEM_ATTRIBUTES, &of_vm);
}

/* What comes to lie there next is not to be touched in its place. */
static int unmap(void)
{
	char *gone = mapped;

	mapped = MAP_FAILED;
	return munmap(gone, PAGES * PAGE);
}

static int touch(const struct call *call)
{
	int number;

	if (mapped == MAP_FAILED) {
		errno = EFAULT;
		return -1;
	}
	number = sigsetjmp(past_the_fault, 1);
	if (number) {
		printf("SIG%s ", sigabbrev_np(number));
		errno = EFAULT;
		return -1;
	}
	*(volatile char *)(mapped + call->start * PAGE) = 1;
	return 0;
}

#ifdef __x86_64__
/* Real mode: a store to the first byte of the data segment, and a halt. */
static const unsigned char code[] = { 0xc6, 0x06, 0x00, 0x00, 0x01, 0xf4 };

static void make_vcpu(int kvm)
{
	char *text = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {
		.slot = MOST_SLOTS, .guest_phys_addr = CODE_GPA, .memory_size = PAGE, .userspace_addr = (uintptr_t)text,
	};
	int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	if (text == MAP_FAILED || size < 0)
		fail("a vCPU's memory");
	memcpy(text, code, sizeof(code));
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		fail("KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		fail("KVM_CREATE_VCPU");
	running = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (running == MAP_FAILED)
		fail("mmap of a vCPU");
}

static int run(const struct call *call)
{
	struct kvm_regs regs = { .rflags = 2 };
	struct kvm_sregs sregs;

	if (ioctl(vcpu, KVM_GET_SREGS, &sregs))
		return -1;
	sregs.cs.base = CODE_GPA;
	sregs.cs.selector = CODE_GPA >> 4;
	sregs.ds.base = call->gfn * PAGE;
	sregs.ds.selector = sregs.ds.base >> 4;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs) || ioctl(vcpu, KVM_RUN, 0))
		return -1;
	if (running->exit_reason != KVM_EXIT_HLT)
		printf("exit reason %u ", running->exit_reason);
	return 0;
}
#else
static void make_vcpu(int kvm)
{
	(void)kvm;
}

static int run(const struct call *call)
{
	(void)call;
	errno = ENOSYS;		/* a guest of this architecture is yours to write */
	return -1;
}
#endif

static int make(const struct call *call)
{
	switch (call->what) {
	case ALLOCATE:
		return fallocate(file, FALLOC_FL_KEEP_SIZE, call->start * PAGE, call->nr * PAGE);
	case PUNCH:
		return fallocate(file, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, call->start * PAGE, call->nr * PAGE);
	case TO_PRIVATE:
		return convert(call, GMEM_PRIVATE);
	case TO_SHARED:
		return convert(call, 0);
	case BIND:
		return bind_pages(call);
	case UNBIND:
		return unbind_pages(call);
	case MAP:
		mapped = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
		return mapped == MAP_FAILED ? -1 : 0;
	case UNMAP:
		return unmap();
	case TOUCH:
		return touch(call);
	case RUN:
		return run(call);
	case CLOSE:
		return close(file);
	}
	return 0;
}

int main(void)
{
	struct gmem_create create = { .size = PAGES * PAGE };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), ret;

	if (kvm < 0)
		fail("/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		fail("KVM_CREATE_VM");
	ret = ioctl(vm, KVM_CHECK_EXTENSION, GMEM_CAP_FLAGS);
	if (ret > 0)
		create.flags = ret & (GMEM_FLAG_MMAP | GMEM_FLAG_SHARED);
	file = ioctl(vm, GMEM_CREATE, &create);
	if (file < 0)
		fail("KVM_CREATE_GUEST_MEMFD");
	window = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (window == MAP_FAILED)
		fail("mmap");
	for (unsigned int number = 0; number < COUNT(slots); number++) {
		if (set_slot(number, &slots[number], slots[number].nr * PAGE))
			fail("KVM_SET_USER_MEMORY_REGION2");
		bound[number] = slots[number];
	}
	make_vcpu(kvm);
	signal(SIGBUS, on_fault);
	signal(SIGSEGV, on_fault);
	for (unsigned int number = 0; number < COUNT(calls); number++) {
		const struct call *call = &calls[number];

		printf("step %d %s %s: ", call->step, call->party, names[call->what]);
		errno = 0;
		puts(make(call) ? strerrorname_np(errno) : "0");
		fflush(stdout);
	}
	return 0;
}
