// A guest that says how much memory it has, and turns itself off.

struct boot_info {
    unsigned long magic, hypervisor, memory, size, window, window_size;
};

static volatile char *const console = (char *)0x9000000;
static volatile long *const control = (long *)0x9010000;

static void print(const char *text)
{
    while (*text)
        *console = *text++;
}

void _start(struct boot_info *boot)
{
    static const char *const sizes[] = {"less than 32 MiB\n", "32 MiB or more\n"};

    print("greetings from C: ");
    print(sizes[boot->size / 1048576.0 >= 32]);
    *control = 0;
}
