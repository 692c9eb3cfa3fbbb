/* Work for guests on pvirq and on real Xen alike, timed by CLOCK_MONOTONIC. What is timed stands between the lines
 * "begin" and "end NANOSECONDS"; whoever reads the console can time it by another clock.
 *
 *   work echo DOMID              sends back each event of that domain; prints its port
 *   work events DOMID PORT N WHERE
 *                                N events to such an echo and back, one after the other, from the CPU that is interrupted
 *                                for it ("together") or from another ("apart")
 *   work read DEVICE BYTES N     N reads of so many bytes, O_DIRECT, one after the other
 *   work ping ADDRESS N          N ICMP echo requests, each sent when the last was answered
 *   work serve PORT              takes TCP connections and reads them to their end, then answers one byte
 *   work send ADDRESS PORT MIB   so many MiB to a server, until its answer
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
typedef uint16_t domid_t;
#include <xen/evtchn.h>

static uint64_t began;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void begin(void)
{
    puts("begin");
    fflush(stdout);
    began = now();
}

static void end(void)
{
    uint64_t took = now() - began;
    printf("end %llu\n", (unsigned long long)took);
    fflush(stdout);
}

static int open_evtchn(void)
{
    int fd = open("/dev/xen/evtchn", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        err(1, "/dev/xen/evtchn");
    return fd;
}

static void notify(int fd, unsigned int port)
{
    struct ioctl_evtchn_notify it = { port };
    if (ioctl(fd, IOCTL_EVTCHN_NOTIFY, &it))
        err(1, "IOCTL_EVTCHN_NOTIFY");
}

/* Wait for an event, and unmask its port. */
static unsigned int take(int fd)
{
    unsigned int port;
    if (read(fd, &port, sizeof port) != sizeof port)
        err(1, "read of an event");
    if (write(fd, &port, sizeof port) != sizeof port)
        err(1, "unmask");
    return port;
}

static void echo(unsigned int domid)
{
    int fd = open_evtchn();
    struct ioctl_evtchn_bind_unbound_port bind = { domid };
    int port = ioctl(fd, IOCTL_EVTCHN_BIND_UNBOUND_PORT, &bind);
    if (port < 0)
        err(1, "IOCTL_EVTCHN_BIND_UNBOUND_PORT");
    printf("%d\n", port);
    fflush(stdout);
    for (;;)
        notify(fd, take(fd));
}

/* The CPU that this process's interrupt comes to, as the kernel has spread it. */
static int interrupted_cpu(void)
{
    char line[4096], path[64];
    int irq = -1, cpu = -1;
    FILE *file = fopen("/proc/interrupts", "r");
    if (!file)
        err(1, "/proc/interrupts");
    while (fgets(line, sizeof line, file))
        if (strstr(line, "evtchn:work"))
            irq = atoi(line);
    fclose(file);
    snprintf(path, sizeof path, "/proc/irq/%d/effective_affinity_list", irq);
    file = fopen(path, "r");
    if (!file || fscanf(file, "%d", &cpu) != 1)
        err(1, "%s", path);
    fclose(file);
    return cpu;
}

static void run_on(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        err(1, "CPU %d", cpu);
}

static void events(unsigned int domid, unsigned int remote, int count, const char *where)
{
    int fd = open_evtchn();
    struct ioctl_evtchn_bind_interdomain bind = { domid, remote };
    int port = ioctl(fd, IOCTL_EVTCHN_BIND_INTERDOMAIN, &bind);
    if (port < 0)
        err(1, "IOCTL_EVTCHN_BIND_INTERDOMAIN");
    int cpu = interrupted_cpu();
    run_on(strcmp(where, "apart") ? cpu : !cpu);
    /* What is pending since the binding is not the echo's. */
    usleep(200000);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    unsigned int stray;
    while (read(fd, &stray, sizeof stray) == sizeof stray)
        if (write(fd, &stray, sizeof stray) != sizeof stray)
            err(1, "unmask");
    fcntl(fd, F_SETFL, 0);
    begin();
    for (int i = 0; i < count; i++) {
        notify(fd, port);
        take(fd);
    }
    end();
}

static void read_disk(const char *device, size_t size, int count)
{
    int fd = open(device, O_RDONLY | O_DIRECT);
    void *buffer;
    if (fd < 0 || posix_memalign(&buffer, 4096, size))
        err(1, "%s", device);
    begin();
    for (int i = 0; i < count; i++)
        if (pread(fd, buffer, size, (off_t)i * size) != (ssize_t)size)
            err(1, "read %d of %s", i, device);
    end();
}

static struct sockaddr_in address(const char *text, int port)
{
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
    if (!inet_aton(text, &to.sin_addr))
        errx(1, "%s is no address", text);
    return to;
}

static uint16_t checksum(const void *data, size_t size)
{
    const uint16_t *words = data;
    uint32_t sum = 0;
    for (size_t i = 0; i < size / 2; i++)
        sum += words[i];
    sum = (sum >> 16) + (sum & 0xffff);
    return ~(sum + (sum >> 16));
}

static void ping(const char *text, int count)
{
    struct sockaddr_in to = address(text, 0);
    struct { struct icmphdr head; char data[56]; } request = { .head.type = ICMP_ECHO };
    char reply[256];
    int fd = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
    if (fd < 0)
        err(1, "socket");
    struct timeval patience = { 5, 0 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    request.head.un.echo.id = htons(getpid() & 0xffff);
    for (int i = -1; i < count; i++) { /* the first one has to ask for the address of the link */
        if (i == 0)
            begin();
        request.head.un.echo.sequence = htons(i + 1);
        request.head.checksum = 0;
        request.head.checksum = checksum(&request, sizeof request);
        if (sendto(fd, &request, sizeof request, 0, (void *)&to, sizeof to) != sizeof request)
            err(1, "send to %s", text);
        for (;;) {
            ssize_t size = recv(fd, reply, sizeof reply, 0);
            if (size < 0)
                err(1, "no answer from %s to request %d", text, i + 1);
            const struct icmphdr *head = (void *)(reply + (reply[0] & 15) * 4);
            if (size >= 28 && head->type == ICMP_ECHOREPLY && head->un.echo.id == request.head.un.echo.id &&
                head->un.echo.sequence == request.head.un.echo.sequence)
                break;
        }
    }
    end();
}

static void serve(int port)
{
    static char buffer[1 << 18];
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (void *)&at, sizeof at) || listen(fd, 1))
        err(1, "listen");
    for (;;) {
        int client = accept(fd, NULL, NULL);
        if (client < 0)
            err(1, "accept");
        while (read(client, buffer, sizeof buffer) > 0)
            ;
        if (write(client, "", 1) != 1)
            warn("answer");
        close(client);
    }
}

static void send_tcp(const char *text, int port, int mib)
{
    static char buffer[1 << 18];
    struct sockaddr_in to = address(text, port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (void *)&to, sizeof to))
        err(1, "connect to %s", text);
    begin();
    for (size_t left = (size_t)mib << 20; left;) {
        ssize_t size = write(fd, buffer, left < sizeof buffer ? left : sizeof buffer);
        if (size <= 0)
            err(1, "send");
        left -= size;
    }
    shutdown(fd, SHUT_WR);
    if (read(fd, buffer, 1) != 1)
        err(1, "the server's answer");
    end();
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "echo") && argc == 3)
        echo(atoi(argv[2]));
    else if (!strcmp(what, "events") && argc == 6)
        events(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), argv[5]);
    else if (!strcmp(what, "read") && argc == 5)
        read_disk(argv[2], atol(argv[3]), atoi(argv[4]));
    else if (!strcmp(what, "ping") && argc == 4)
        ping(argv[2], atoi(argv[3]));
    else if (!strcmp(what, "serve") && argc == 3)
        serve(atoi(argv[2]));
    else if (!strcmp(what, "send") && argc == 5)
        send_tcp(argv[2], atoi(argv[3]), atoi(argv[4]));
    else
        errx(2, "usage: work echo|events|read|ping|serve|send ...");
    return 0;
}
