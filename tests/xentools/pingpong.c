/* pingpong DOMID PORT N: bind a channel to that port of that domain; N times notify, and wait for the answer. */
#include <stdio.h>
#include <stdlib.h>
#include <xenevtchn.h>

static xenevtchn_handle *xce;
static xenevtchn_port_or_error_t port;

static void wait_for_event(void)
{
	xenevtchn_port_or_error_t got = xenevtchn_pending(xce);

	if (got != port || xenevtchn_unmask(xce, port) < 0) {
		printf("pending: %d\n", got);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	xce = xenevtchn_open(NULL, 0);
	if (!xce) {
		perror("open");
		return 1;
	}
	port = xenevtchn_bind_interdomain(xce, atoi(argv[1]), atoi(argv[2]));
	if (port < 0) {
		perror("bind");
		return 1;
	}
	printf("port %d\n", port);
	fflush(stdout);
	wait_for_event(); /* binding raises the local port once: the other side may have notified before */
	for (int i = atoi(argv[3]); i > 0; i--) {
		if (xenevtchn_notify(xce, port) < 0) {
			perror("notify");
			return 1;
		}
		wait_for_event();
	}
	/* While the port is open: closing it takes its row away. */
	if (system("cat /proc/interrupts"))
		return 1;
	return xenevtchn_close(xce) != 0;
}
