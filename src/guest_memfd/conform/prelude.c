// What the operations of gmem conform are in C; what comes after this is one sequence of them. Build it with gcc -O1, and run it
// where /dev/kvm is. It prints what each call said, and what is seen of the files afterwards: size, resident pages, checksums.
// The program of a counterexample (export/templates/program.c) is another: it is short enough to be pasted into a mail, has one
// file and one VM, and says the errno of each call. This one has six files, two VMs, and looks at all of them afterwards.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ULL
#define OWN_SLOT 0x10000ULL
#define OWN_SIZE 0x10000ULL
#define CODE 0x18000ULL
#define RESULT 0x30000000ULL
#define FILES 6
#define MAPPINGS 4
#define MOST_PAGES 8
// No limit but the machine's memory holds for a guest_memfd, and it is counted to no process.
#define MOST_BYTES (1LL << 20)
#define TOO_MUCH "not tried: it would take too much memory"

// Newer than some headers.
#define MEMORY_FAULT_EXIT 39
struct create_args { uint64_t size, flags, reserved[6]; };
struct region2_args { uint32_t slot, flags; uint64_t gpa, size, user, offset; uint32_t fd, pad1; uint64_t pad2[14]; };
struct attributes2_args { uint64_t offset, size, attributes, flags, error_offset, reserved[11]; };
#define CREATE _IOWR(KVMIO, 0xd4, struct create_args)
#define REGION2 _IOW(KVMIO, 0x49, struct region2_args)
#define ATTRIBUTES2 _IOWR(KVMIO, 0xd2, struct attributes2_args)
#define VM_ATTRIBUTES 0x4020aed2UL

static int file[FILES] = {-1, -1, -1, -1, -1, -1}, pinned[2] = {-1, -1}, vm[2] = {-1, -1}, vcpu[2] = {-1, -1};
static int vm_made[2], vcpu_made[2], vcpu_ran[2];
static struct kvm_run *run_page[2];
static struct { char *at; uint64_t size; } mapping[MAPPINGS];
static uint64_t file_size[FILES];
static char said[256];
static sigjmp_buf back;
static siginfo_t caught;

static void say(const char *form, ...)
{
	va_list args;
	va_start(args, form);
	vsnprintf(said, sizeof said, form, args);
	va_end(args);
}

static const char *name_of(int error)
{
	static char number[16];
	static const struct { int error; const char *name; } names[] = {
		{EBADF, "EBADF"}, {EINVAL, "EINVAL"}, {EEXIST, "EEXIST"}, {EFAULT, "EFAULT"}, {EFBIG, "EFBIG"}, {EIO, "EIO"},
		{ENODEV, "ENODEV"}, {ENOMEM, "ENOMEM"}, {ENOTTY, "ENOTTY"}, {EOPNOTSUPP, "EOPNOTSUPP"}, {EOVERFLOW, "EOVERFLOW"},
		{EPERM, "EPERM"}, {EACCES, "EACCES"}, {ESPIPE, "ESPIPE"}, {EAGAIN, "EAGAIN"}, {EBUSY, "EBUSY"}, {ENOENT, "ENOENT"},
	};
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		if (names[i].error == error)
			return names[i].name;
	snprintf(number, sizeof number, "%d", error);
	return number;
}

// What a call returned, in words.
static long answer(long ret)
{
	say("%s", ret < 0 ? name_of(errno) : "ok");
	return ret;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint32_t checksum(const unsigned char *data, uint64_t nr)
{
	uint32_t sum = ~0U;
	for (uint64_t i = 0; i < nr; i++) {
		sum ^= data[i];
		for (int bit = 0; bit < 8; bit++)
			sum = sum >> 1 ^ (sum & 1 ? 0xedb88320U : 0);
	}
	return ~sum;
}

// By the kernel, which stops where a load or store would be a signal: how many bytes came.
static uint64_t copied(int out, void *suspect, void *ours, uint64_t nr)
{
	struct iovec local = {suspect, nr}, remote = {ours, nr};
	ssize_t ret = out ? process_vm_writev(getpid(), &local, 1, &remote, 1, 0) : process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
	return ret < 0 ? 0 : ret;
}

static uint64_t resident(int fd, uint64_t offset, uint64_t nr)
{
	uint64_t range[2] = {offset, nr}, counts[5];
	return syscall(451, fd, range, counts, 0) ? 0 : counts[0];          // cachestat(2)
}

static void show_files(void)
{
	static unsigned char data[PAGE];
	const char *between = "";
	printf("[");
	for (int n = 0; n < FILES; n++) {
		if (file[n] < 0)
			continue;
		printf("%s%d: 0x%llx %llu", between, n, (unsigned long long)file_size[n], (unsigned long long)resident(file[n], 0, 0));
		between = "; ";
		if (file_size[n] > MOST_PAGES * PAGE)
			continue;
		char *seen = mmap(NULL, file_size[n], PROT_READ, MAP_SHARED, file[n], 0);
		for (uint64_t at = 0; at < file_size[n]; at += PAGE) {
			if (!resident(file[n], at, PAGE))
				continue;
			printf(" %llu:", (unsigned long long)(at / PAGE));
			if (seen == MAP_FAILED || copied(1, seen + at, data, PAGE) < PAGE)
				printf("-");
			else if (checksum(data, PAGE) == 0xc71c0011)
				printf("zero");
			else
				printf("%08x", checksum(data, PAGE));
		}
		if (seen != MAP_FAILED)
			munmap(seen, file_size[n]);
	}
	printf("]\n");
}

// -- files -----------------------------------------------------------------------------------------------------------------

static int kvm(void)
{
	static int fd = -1;
	if (fd < 0 && (fd = open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0)
		die("/dev/kvm");
	return fd;
}

// A VM with its slot 0: page tables, then the guest's two programs.
static int vm_of(int n)
{
	static const unsigned char load[] = {0x48, 0x8b, 3, 0x48, 0x89, 1, 0xeb, 0xfe}, store[] = {0x48, 0x89, 0x13, 0x48, 0x89, 1, 0xeb, 0xfe};
	if (vm_made[n]++)
		return vm[n];
	if ((vm[n] = ioctl(kvm(), KVM_CREATE_VM, 0)) < 0)
		die("KVM_CREATE_VM");
	char *own = mmap(NULL, OWN_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t *table = (uint64_t *)own;
	table[0] = (OWN_SLOT + PAGE) | 0x27;
	table[512] = (OWN_SLOT + 2 * PAGE) | 0x27;
	for (uint64_t i = 0; i < 512; i++)
		table[1024 + i] = i << 21 | 0xe7;
	memcpy(own + (CODE - OWN_SLOT), load, sizeof load);
	memcpy(own + (CODE - OWN_SLOT) + PAGE, store, sizeof store);
	struct kvm_userspace_memory_region slot = {0, 0, OWN_SLOT, OWN_SIZE, (uintptr_t)own};
	if (ioctl(vm[n], KVM_SET_USER_MEMORY_REGION, &slot))
		die("KVM_SET_USER_MEMORY_REGION");
	return vm[n];
}

static void leave(int n)
{
	if (file[n] >= 0)
		close(file[n]);
	file[n] = -1;
}

static void op_create(int n, int of, uint64_t size, uint64_t flags)
{
	struct create_args args = {size, flags};
	leave(n);
	file[n] = answer(ioctl(vm_of(of), CREATE, &args));
	file_size[n] = size;
}

static void op_dup(int n, int of)
{
	uint64_t size = file_size[of];
	int fd = answer(file[of] < 0 ? (errno = EBADF, -1) : dup(file[of]));
	if (fd < 0)
		return;
	leave(n);
	file[n] = fd;
	file_size[n] = size;
}

static void op_close(int n)
{
	answer(close(file[n]));
	file[n] = -1;
}

static void op_fallocate(int n, int mode, int64_t offset, int64_t nr)
{
	if (mode == 1 && nr > MOST_BYTES && file[n] >= 0 && offset >= 0 && (uint64_t)(offset + nr) <= file_size[n])
		return say(TOO_MUCH);
	answer(fallocate(file[n], mode, offset, nr));
}

static void op_stat(int n)
{
	struct stat found;
	if (answer(fstat(file[n], &found)) == 0)
		say("size 0x%llx blocks %lld", (unsigned long long)found.st_size, (long long)found.st_blocks);
}

static void op_other(int n, int which)
{
	char data[8] = "12345678";
	switch (which) {
	case 0: answer(read(file[n], data, 8)); break;
	case 1: answer(write(file[n], data, 8)); break;
	case 2: answer(pread(file[n], data, 8, 0)); break;
	case 3: answer(pwrite(file[n], data, 8, 0)); break;
	case 4: answer(lseek(file[n], 0, SEEK_SET)); break;
	case 5: answer(ftruncate(file[n], PAGE)); break;
	case 6: answer(fchmod(file[n], 0600)); break;
	case 7: answer(fsync(file[n])); break;
	}
}

static void op_attributes(int n, uint64_t offset, uint64_t size, uint64_t attributes, uint64_t flags)
{
	struct attributes2_args args = {offset, size, attributes, flags};
	if (ioctl(file[n], ATTRIBUTES2, &args))
		say("%s at 0x%llx", name_of(errno), (unsigned long long)args.error_offset);
	else
		say("ok");
}

// -- mappings --------------------------------------------------------------------------------------------------------------

static void op_unmap(int m)
{
	if (!mapping[m].at)
		return say("nothing is mapped");
	answer(munmap(mapping[m].at, mapping[m].size));
	mapping[m].at = NULL;
}

static void op_map(int m, int n, int64_t offset, int64_t nr, int how)
{
	op_unmap(m);
	void *at = (void *)syscall(SYS_mmap, NULL, nr, how == 2 ? PROT_READ : PROT_READ | PROT_WRITE, how == 1 ? MAP_PRIVATE : MAP_SHARED,
				   file[n], offset);
	if (answer((long)at == -1 ? -1 : 0))
		return;
	mapping[m].at = at;
	mapping[m].size = nr;
}

static int beyond(int m, uint64_t at, uint64_t nr)
{
	if (mapping[m].at && at + nr <= mapping[m].size)
		return 0;
	say("nothing is mapped");
	return 1;
}

static void handler(int number, siginfo_t *info, void *context)
{
	(void)context;
	caught = *info;
	siglongjmp(back, number);
}

static void op_load(int m, uint64_t at)
{
	if (beyond(m, at, 8))
		return;
	int number = sigsetjmp(back, 1);
	if (number)
		return say("%s code %d at +0x%lx", number == SIGBUS ? "SIGBUS" : "SIGSEGV", caught.si_code, (long)((char *)caught.si_addr - mapping[m].at));
	unsigned char *data = (unsigned char *)mapping[m].at + at, text[17];
	uint64_t value = *(volatile uint64_t *)data;
	for (int i = 0; i < 8; i++)
		sprintf((char *)text + 2 * i, "%02x", (unsigned)(value >> 8 * i & 0xff));
	say("%s", text);
}

static void op_store(int m, uint64_t at, uint64_t value)
{
	if (beyond(m, at, 8))
		return;
	int number = sigsetjmp(back, 1);
	if (number)
		return say("%s code %d at +0x%lx", number == SIGBUS ? "SIGBUS" : "SIGSEGV", caught.si_code, (long)((char *)caught.si_addr - mapping[m].at));
	*(volatile uint64_t *)(mapping[m].at + at) = value;
	say("ok");
}

static void op_read(int m, uint64_t at, uint64_t nr)
{
	static unsigned char data[16 * PAGE];
	if (beyond(m, at, nr))
		return;
	uint64_t done = copied(1, mapping[m].at + at, data, nr);
	if (done < nr)
		say("EFAULT at +0x%llx", (unsigned long long)(at + done));
	else
		say("%08x", checksum(data, nr));
}

static void op_write(int m, uint64_t at, uint64_t nr, uint64_t value)
{
	static uint64_t data[2 * PAGE];
	if (beyond(m, at, nr))
		return;
	for (uint64_t i = 0; i <= nr / 8; i++)
		data[i] = value;
	uint64_t done = copied(0, mapping[m].at + at, data, nr);
	if (done < nr)
		say("EFAULT at +0x%llx", (unsigned long long)(at + done));
	else
		say("ok");
}

static void op_advise(int m, int advice, uint64_t at, uint64_t nr)
{
	uint64_t end = (mapping[m].size + PAGE - 1) & -PAGE;
	if (!mapping[m].at || at >= end)
		return say("nothing is mapped");
	if (nr > end - at)
		nr = end - at;
	if (nr > MOST_BYTES)
		return say(TOO_MUCH);
	answer(madvise(mapping[m].at + at, nr, advice));
}

static void op_unpin(int p)
{
	unsigned char data[8] = {0};
	if (pinned[p] < 0)
		return say("no pin");
	if (read(pinned[p], data, 8) < 0)
		die("read of a pipe");
	close(pinned[p]);
	pinned[p] = -1;
	for (int i = 0; i < 8; i++)
		sprintf(said + 2 * i, "%02x", data[i]);
}

static void op_pin(int p, int m, uint64_t at)
{
	int ends[2];
	op_unpin(p);
	if (beyond(m, at, 8))
		return;
	if (pipe(ends))
		die("pipe");
	struct iovec piece = {mapping[m].at + at, 8};
	long ret = answer(vmsplice(ends[1], &piece, 1, 0));
	close(ends[1]);
	if (ret < 0)
		close(ends[0]);
	else
		pinned[p] = ends[0];
}

// -- slots and guests ------------------------------------------------------------------------------------------------------

static void op_region(int n, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t user, int of, uint64_t offset)
{
	struct region2_args args = {slot, flags, gpa, size, user, offset, file[of]};
	answer(ioctl(vm_of(n), REGION2, &args));
}

static void op_region1(int n, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, uint64_t user)
{
	struct kvm_userspace_memory_region args = {slot, flags, gpa, size, user};
	answer(ioctl(vm_of(n), KVM_SET_USER_MEMORY_REGION, &args));
}

static void op_vm_attributes(int n, uint64_t gpa, uint64_t size, uint64_t attributes)
{
	uint64_t args[4] = {gpa, size, attributes, 0};
	answer(ioctl(vm_of(n), VM_ATTRIBUTES, args));
}

static void op_extension(int n, int cap)
{
	long ret = answer(ioctl(vm_of(n), KVM_CHECK_EXTENSION, cap));
	if (ret >= 0)
		say("%ld", ret);
}

#ifdef __x86_64__
static long make_vcpu(int n)
{
	int fd = ioctl(vm_of(n), KVM_CREATE_VCPU, 0);
	if (fd < 0)
		return answer(-1);
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entry; } cpuid = {{1}, {.function = 0x80000001, .edx = 1 << 29 | 1 << 20 | 1 << 11}};
	run_page[n] = mmap(NULL, ioctl(kvm(), KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ioctl(fd, KVM_SET_CPUID2, &cpuid) || run_page[n] == MAP_FAILED)
		die("a vCPU");
	vcpu[n] = fd;
	vcpu_made[n] = 1;
	return 0;
}

static void guest(int n, uint64_t gpa, int stores, uint64_t value)
{
	if (!vcpu_made[n] && make_vcpu(n) < 0)
		return;
	if (vcpu[n] < 0)
		return say("EBADF");
	if (vcpu_ran[n]++) {                    // what the last exit began is finished before registers change
		run_page[n]->immediate_exit = 1;
		ioctl(vcpu[n], KVM_RUN, 0);
		run_page[n]->immediate_exit = 0;
	}
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = CODE + (stores ? PAGE : 0), .rflags = 2, .rbx = gpa, .rcx = RESULT, .rdx = value};
	struct kvm_segment code = {.limit = ~0U, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
	struct kvm_segment data = {.limit = ~0U, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1};
	ioctl(vcpu[n], KVM_GET_SREGS, &sregs);
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.idt.limit = sregs.gdt.limit = 0;
	sregs.cr0 = 0x80050033, sregs.cr3 = OWN_SLOT, sregs.cr4 = 0x620, sregs.efer = 0xd01;
	if (ioctl(vcpu[n], KVM_SET_SREGS, &sregs) || ioctl(vcpu[n], KVM_SET_REGS, &regs))
		die("registers");
	long ret = ioctl(vcpu[n], KVM_RUN, 0);
	int error = ret < 0 ? errno : 0;
	const uint64_t *fault = (uint64_t *)((char *)run_page[n] + 32);         // flags, gpa, size
	if (error && run_page[n]->exit_reason == MEMORY_FAULT_EXIT)
		say("%s, memory fault flags 0x%llx gpa 0x%llx size 0x%llx", name_of(error), (unsigned long long)fault[0],
		    (unsigned long long)fault[1], (unsigned long long)fault[2]);
	else if (error)
		say("%s, and no more is said", name_of(error));
	else if (run_page[n]->exit_reason != KVM_EXIT_MMIO)
		say("exit %u", run_page[n]->exit_reason);
	else if (run_page[n]->mmio.phys_addr != RESULT)
		say("mmio %s 0x%llx", run_page[n]->mmio.is_write ? "store" : "load", (unsigned long long)run_page[n]->mmio.phys_addr);
	else if (stores)
		say("ok");
	else {
		memcpy(&value, run_page[n]->mmio.data, 8);
		say("0x%llx", (unsigned long long)value);
	}
}
#else
static void guest(int n, uint64_t gpa, int stores, uint64_t value)
{
	(void)n, (void)gpa, (void)stores, (void)value;
	say("the guest's program is x86's");
}
#endif

static void op_guest_load(int n, uint64_t gpa)
{
	guest(n, gpa, 0, 0);
}

static void op_guest_store(int n, uint64_t gpa, uint64_t value)
{
	guest(n, gpa, 1, value);
}

static void op_close_vcpu(int n)
{
	if (vcpu[n] < 0)
		return say("no vCPU");
	answer(close(vcpu[n]));
	vcpu[n] = -1;
}

static void op_close_vm(int n)
{
	vm_of(n);
	if (vm[n] >= 0)
		close(vm[n]);
	vm[n] = -1;
	say("ok");
}

// -- forked children -------------------------------------------------------------------------------------------------------

static void in_child(void (*act)(int, uint64_t), int n, uint64_t at)
{
	int ends[2];
	fflush(stdout);
	if (pipe(ends))
		die("pipe");
	pid_t pid = fork();
	if (!pid) {
		act(n, at);
		_exit(write(ends[1], said, sizeof said) < 0);
	}
	close(ends[1]);
	if (read(ends[0], said, sizeof said) < 0)
		die("read of a pipe");
	close(ends[0]);
	waitpid(pid, NULL, 0);
}

static void child_reads(int m, uint64_t at)
{
	op_read(m, at, 8);
}

static void child_asks(int n, uint64_t cap)
{
	op_extension(n, cap);
}

static void op_child_load(int m, uint64_t at)
{
	in_child(child_reads, m, at);
}

static void op_child_vm(int n)
{
	vm_of(n);
	in_child(child_asks, n, 0);
}

static void begin(void)
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER};
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
}

#define STEP(op, ...) do { op_##op(__VA_ARGS__); printf("%s(%s) -> %s  ", #op, #__VA_ARGS__, said); show_files(); } while (0)

